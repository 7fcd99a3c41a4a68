// Node `ws` with ioredis: a Redis channel a session, every socket of it in a set.
const http = require("http");
const Redis = require("ioredis");
const { WebSocketServer } = require("ws");
const { control } = require("./writer");

const pub = new Redis(process.env.REDIS_URL);
const sub = new Redis(process.env.REDIS_URL);
const rooms = new Map();

const server = http.createServer(control((session, event) => pub.publish(session, JSON.stringify(event))));
const wss = new WebSocketServer({ server });

wss.on("connection", (socket, request) => {
  const session = request.url.split("/").pop();
  if (!rooms.has(session)) {
    rooms.set(session, new Set());
    sub.subscribe(session);
  }
  rooms.get(session).add(socket);
  socket.on("error", console.error);
  socket.on("close", () => rooms.get(session).delete(socket));
});

sub.on("message", (session, text) => {
  for (const socket of rooms.get(session)) socket.send(text);
});

server.listen(process.env.PORT, "127.0.0.1");
