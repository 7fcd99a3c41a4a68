"""Every HTTP route. Each answers with and without its trailing slash. The first ones are found soonest."""

from starlette.routing import Route

from . import accounts, admin, ag_ui, ai_sdk, arena, messages, openai, operations, pages, sessions

# fmt: off
table = [
    Route("/api/health",                              operations.health),
    Route("/health",                                  operations.health),
    Route("/livez",                                   operations.live),
    Route("/live",                                    operations.live),
    Route("/readyz",                                  operations.ready),
    Route("/ready",                                   operations.ready),

    Route("/api/messages/stream",                     messages.stream,            methods=["POST"]),
    Route("/api/messages",                            messages.listing),
    Route("/api/messages/{message_id}/regenerate",    messages.regenerate,        methods=["POST"]),
    Route("/api/sessions/{session_id}/stream",        messages.session_stream),
    Route("/api/sessions/{session_id}/stop",          messages.stop,              methods=["POST"]),

    Route("/metrics",                                 operations.metrics),

    Route("/api/auth/anonymous",                      accounts.anonymous,         methods=["POST"]),
    Route("/api/auth/refresh",                        accounts.refresh,           methods=["POST"]),
    Route("/api/auth/revoke",                         accounts.revoke,            methods=["POST"]),
    Route("/api/auth/ticket",                         accounts.ticket,            methods=["POST"]),
    Route("/api/users/me",                            accounts.me),
    Route("/api/users/me",                            accounts.change_me,         methods=["PATCH"]),
    Route("/api/users/me",                            accounts.delete_me,         methods=["DELETE"]),
    Route("/api/users/update_preferences",            accounts.change_me,         methods=["PATCH"]),

    Route("/api/models",                              operations.models),
    Route("/api/models/{model_id:path}",              operations.model),

    Route("/api/sessions",                            sessions.create,            methods=["POST"]),
    Route("/api/sessions",                            sessions.listing),
    Route("/api/sessions/{session_id}",               sessions.opened),
    Route("/api/sessions/{session_id}",               sessions.change,            methods=["PATCH"]),
    Route("/api/sessions/{session_id}",               sessions.delete,            methods=["DELETE"]),
    Route("/api/sessions/{session_id}/share",         sessions.share,             methods=["POST"]),
    Route("/api/sessions/{session_id}/unshare",       sessions.unshare,           methods=["POST"]),
    Route("/api/sessions/{session_id}/generate_title", sessions.generate_title,   methods=["POST"]),
    Route("/api/sessions/{session_id}/export",        sessions.export),
    Route("/api/shared/{token}",                      sessions.shared),

    Route("/api/admin/sessions",                      admin.listing),
    Route("/api/admin/sessions/{session_id}",         admin.opened),
    Route("/api/admin/sessions/{session_id}",         admin.change,               methods=["PATCH"]),

    Route("/api/feedback",                            arena.feedback,             methods=["POST"]),
    Route("/api/feedback",                            arena.given),
    Route("/api/leaderboard",                         arena.leaderboard),
    Route("/api/leaderboard/details",                 arena.details),
    Route("/api/arena/votes.jsonl",                   arena.export),

    Route("/api/chat",                                ai_sdk.chat,                methods=["POST"]),
    Route("/api/chat/{session_id}/stream",            ai_sdk.stream),
    Route("/api/chat/{session_id}/stop",              messages.stop,              methods=["POST"]),
    Route("/api/ag-ui",                               ag_ui.run,                  methods=["POST"]),
    Route("/api/ag-ui",                               ag_ui.join),

    Route("/v1/models",                               openai.models),
    Route("/v1/models/{model_id:path}",               openai.model),
    Route("/v1/chat/completions",                     openai.completions,         methods=["POST"]),

    Route("/",                                        pages.index),
    Route("/arena",                                   pages.arena),
    Route("/leaderboard",                             pages.leaderboard),
    Route("/shared/{token}",                          pages.shared),
    Route("/debug",                                   pages.debug),
    Route("/admin",                                   pages.admin),
    Route("/widget.js",                               pages.widget),
    Route("/widget/{name}",                           pages.asset),
    Route("/api/widget",                              pages.widget_settings),
]
# fmt: on
