"""Django Channels with channels_redis, as its tutorial shows: a group a session, a consumer a socket."""

import json
import os

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="benchmark",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["daphne"],
    CHANNEL_LAYERS={
        "default": {
            "BACKEND": os.environ.get("CHANNEL_LAYER", "channels_redis.core.RedisChannelLayer"),
            "CONFIG": {"hosts": [os.environ["REDIS_URL"]]},
        },
    },
)
django.setup()

import writer  # noqa: E402
from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402
from channels.layers import get_channel_layer  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.urls import path, re_path  # noqa: E402

running = set()


class ChatConsumer(AsyncWebsocketConsumer):
    async def connect(self):
        self.room_group_name = self.scope["url_route"]["kwargs"]["session"]
        await self.channel_layer.group_add(self.room_group_name, self.channel_name)
        await self.accept()

    async def disconnect(self, close_code):
        await self.channel_layer.group_discard(self.room_group_name, self.channel_name)

    async def chat_message(self, event):
        await self.send(text_data=json.dumps(event["message"]))


async def publish(session, event):
    await get_channel_layer().group_send(session, {"type": "chat.message", "message": event})


async def write(request):
    running.add(writer.start(publish, request.META["QUERY_STRING"]))
    return HttpResponse("writing")


urlpatterns = [path("write", write)]
app = ProtocolTypeRouter(
    {
        "http": get_asgi_application(),
        "websocket": URLRouter([re_path(r"^ws/(?P<session>\w+)$", ChatConsumer.as_asgi())]),
    }
)
