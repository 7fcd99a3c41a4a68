// The writer of the Node peers: writer.py once more.
const TURN = "0197f7c2-54a1-7d3e-9c0b-6a1f2e3d4c5b";
const REPLY = "0197f7c2-54a2-7b61-8f12-0d9e8c7b6a5f";
const LATE = 1; // seconds; a writer that runs behind by more drops the rest

const now = () => Number(process.hrtime.bigint() / 1000n) / 1e6;

function event(n, pad) {
  const marker = `⟨${n}:${process.hrtime.bigint() / 1000n}⟩ `;
  return {
    type: "message_chunk",
    turn_id: TURN,
    seq: n,
    message_id: REPLY,
    participant: "a",
    chunk: marker + "x".repeat(pad),
    requestId: TURN,
  };
}

function pace(publish, session, start, rate, count, pad) {
  let n = 0;
  const step = () => {
    for (; n < count; n++) {
      const wait = start + n / rate - now();
      if (wait < -LATE) return;
      if (wait > 0) return setTimeout(step, wait * 1000);
      publish(session, event(n, pad));
    }
  };
  step();
}

// Answers GET /write?sessions=&rate=&seconds=&pad= and begins to write.
exports.control = (publish) => (request, response) => {
  const query = new URL(request.url, "http://localhost").searchParams;
  const [sessions, rate, seconds, pad] = ["sessions", "rate", "seconds", "pad"].map((name) => Number(query.get(name)));
  for (let i = 0; i < sessions; i++) {
    pace(publish, `s${i}`, now() + i / sessions / rate, rate, Math.round(rate * seconds), pad);
  }
  response.end("writing");
};
