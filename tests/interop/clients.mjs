// Reads the service with one of Node's clients: node clients.mjs <client> <what it has to know, as JSON>.
// Prints a line of JSON for everything it sees, when it sees it.
import {EventSource} from 'eventsource'
import WS from 'ws'

const [client, given] = [process.argv[2], JSON.parse(process.argv[3])]
const print = (seen) => console.log(JSON.stringify(seen))
const headers = {Authorization: `Bearer ${given.token}`}
const body = JSON.stringify({session_id: given.session, content: given.content})
const message = JSON.stringify({type: 'message', content: given.content})

// A turn on a socket, which comes back with its last cursor until it has heard the end.
const converse = (open, cursor) => {
  const socket = open(cursor ? `${given.socket}?cursor=${cursor}` : given.socket)
  let over = false
  socket.onopen = () => cursor || socket.send(message)
  socket.onmessage = ({data}) => {
    const event = JSON.parse(data)
    print(event)
    cursor = event.cursor ?? cursor
    over = event.type === 'turn_complete'
    if (over) socket.close(1000)
  }
  socket.onerror = () => {}
  socket.onclose = ({code}) =>
    over ? print({closed: code, protocol: socket.protocol}) : setTimeout(() => converse(open, cursor), 20)
}

const clients = {
  // The pieces of an answer as they come, bytes in base64.
  async fetch() {
    const answer = await fetch(`${given.base}/api/messages/stream/`, {
      method: 'POST', body, headers: {...headers, 'Content-Type': 'application/json', Accept: given.accept},
    })
    print({status: answer.status, type: answer.headers.get('content-type')})
    for await (const piece of answer.body) print({piece: Buffer.from(piece).toString('base64')})
  },

  // Node's own WebSocket, which is a browser's: no headers.
  WebSocket: () => converse((url) => new WebSocket(url, ['parley.v1', `t.${given.token}`])),

  // The package `ws`, with the compression it offers by default.
  ws: () => converse((url) => new WS(url, {headers})),

  // The package `eventsource`, with the header no browser's can send; it stops when it is told that there is no more.
  async eventsource() {
    const source = new EventSource(`${given.base}/api/sessions/${given.session}/stream/`, {
      fetch: (url, options) => {
        print({asked: options.headers['Last-Event-ID'] ?? null})
        return fetch(url, {...options, headers: {...options.headers, ...headers}})
      },
    })
    for (const kind of ['resumed', 'message_update', 'message_chunk', 'message_complete', 'turn_complete', 'done'])
      source.addEventListener(kind, ({data, lastEventId}) => print({kind, id: lastEventId, event: JSON.parse(data)}))
    source.onerror = () => source.readyState === EventSource.CLOSED && print({closed: true})
  },
}
await clients[client]()
