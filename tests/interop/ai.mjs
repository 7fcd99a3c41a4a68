// The AI SDK's chat (the class behind every useChat), driven by commands: node ai.mjs; see tabs.mjs.
// Prints the chat's messages and status whenever they change.
import {serve} from './tabs.mjs'

await serve(async (given, print) => {
  const {AbstractChat, DefaultChatTransport, WebSocketChatTransport} = await import(given.package)

  class State {
    #messages = given.messages ?? []
    #status = 'ready'
    error = undefined
    get messages() { return this.#messages }
    set messages(messages) { this.#messages = messages; this.tell() }
    get status() { return this.#status }
    set status(status) { this.#status = status; this.tell() }
    pushMessage = (message) => { this.messages = [...this.#messages, message] }
    popMessage = () => { this.messages = this.#messages.slice(0, -1) }
    replaceMessage = (index, message) => { this.messages = this.#messages.with(index, structuredClone(message)) }
    snapshot = (thing) => structuredClone(thing)
    tell() {
      const messages = this.#messages.map(({id, role, parts}) => ({
        id, role, texts: parts.filter((part) => part.type === 'text').map((part) => part.text),
      }))
      print({status: this.#status, error: this.error?.message, messages})
    }
  }

  const headers = given.token ? {Authorization: `Bearer ${given.token}`} : {}
  const options = {headers, body: given.body ?? {}}
  const transport = given.socket
    ? new WebSocketChatTransport({url: given.socket, protocols: ['parley.v1', `t.${given.token}`], ...options, webSocket: (await import('ws')).default})
    : new DefaultChatTransport({api: `${given.base}/api/chat`, ...options})

  class Chat extends AbstractChat {
    constructor() {
      super({id: given.id, transport, state: new State(), onError: (error) => print({problem: error.message})})
    }
  }

  const chat = new Chat()
  return {
    send: ({text}) => chat.sendMessage({text}),
    edit: ({text, messageId}) => chat.sendMessage({text, messageId}),
    again: ({messageId}) => chat.regenerate({messageId}),
    resume: () => chat.resumeStream(),
    stop: () => chat.stop(),
    leave: () => transport.close?.(),
  }
})
