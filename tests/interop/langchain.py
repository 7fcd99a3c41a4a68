"""LangChain's ChatOpenAI: a completion whole and streamed, an unknown model, a model that fails; one JSON line."""

import json
import sys

from langchain_openai import ChatOpenAI

given = json.loads(sys.argv[1])
connection = {"base_url": f"{given['base']}/v1", "api_key": given["key"], "max_retries": 0}
chat = ChatOpenAI(model="demo", **connection)


def failed(work):
    try:
        work()
    except Exception as problem:
        return {"kind": type(problem).__name__, "message": str(problem)}


whole = chat.invoke([("system", "Be brief."), ("user", given["content"])])
pieces = [chunk.content for chunk in chat.stream(given["content"])]
print(
    json.dumps(
        {
            "whole": whole.content,
            "finish": whole.response_metadata["finish_reason"],
            "tokens": whole.usage_metadata["output_tokens"],
            "streamed": "".join(pieces),
            "pieces": len(pieces),
            "unknown": failed(lambda: ChatOpenAI(model="none", **connection).invoke("Hello")),
            "failing": failed(lambda: list(chat.stream("/fail 2"))),
        }
    )
)
