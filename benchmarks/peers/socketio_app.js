// Node socket.io with its Redis adapter: a room a session.
const http = require("http");
const Redis = require("ioredis");
const { Server } = require("socket.io");
const { createAdapter } = require("@socket.io/redis-adapter");
const { control } = require("./writer");

const pub = new Redis(process.env.REDIS_URL);
const io = new Server({ adapter: createAdapter(pub, pub.duplicate()) });

const write = control((session, event) => io.to(session).emit("message_chunk", event));
const server = http.createServer((request, response) => {
  if (request.url.startsWith("/write")) write(request, response);
});
io.attach(server);
io.on("connection", (socket) => socket.join(socket.handshake.query.session));

server.listen(process.env.PORT, "127.0.0.1");
