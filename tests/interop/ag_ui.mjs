// AG-UI's own client and TanStack AI's, driven by commands: node ag_ui.mjs <client>; see tabs.mjs.
import {HttpAgent} from '@ag-ui/client'
import {ChatClient, fetchServerSentEvents} from '@tanstack/ai-client'
import {serve} from './tabs.mjs'

const clients = {
  agui({url, headers, given, print}) {
    const agent = new HttpAgent({url, headers, threadId: given.id})
    agent.messages = given.messages ?? []
    const show = () => print({messages: agent.messages.map(({id, role, content}) => ({id, role, texts: [content]}))})
    const subscriber = {
      onEvent: ({event}) => print({event: event.type}),
      onMessagesChanged: show,
      onRunErrorEvent: ({event}) => print({problem: event.message}),
    }
    const run = () => agent.runAgent({forwardedProps: given.body ?? {}}, subscriber).then(show)
    return {
      send({text, id}) {
        agent.addMessage({id, role: 'user', content: text})
        return run()
      },
      again() { // without the half of an answer, to which the client would add the whole
        agent.messages = agent.messages.slice(0, 1 + agent.messages.findLastIndex(({role}) => role === 'user'))
        return run()
      },
    }
  },

  tanstack({url, headers, given, print}) {
    const fetchClient = async (url, options) => {
      const asked = new Headers(options?.headers)
      const {runId} = JSON.parse(options?.body ?? '{}')
      print({asked: options?.method ?? 'GET', runId, after: asked.get('Last-Event-ID')})
      return fetch(url, options)
    }
    const show = (messages) => print({
      messages: messages.map(({id, role, parts}) => ({
        id, role, texts: parts.filter(({type}) => type === 'text').map(({content}) => content),
      })),
    })
    const connection = fetchServerSentEvents(url, {headers, body: given.body, fetchClient, reconnect: {delayMs: 20}})
    const client = new ChatClient({
      threadId: given.id, connection, onMessagesChange: show,
      onError: (error) => print({problem: error.message}), onFinish: () => print({finished: true}),
    })
    return {
      send: ({text}) => client.sendMessage(text),
      again: () => client.reload(),
      stop: () => client.stop(),
      async join({runId}) {
        for await (const chunk of connection.joinRun(runId)) print({joined: chunk})
      },
      hydrate: async () => print({hydrated: await connection.hydrate(given.id)}),
    }
  },
}
if (process.argv[2] === 'agui') process.on('unhandledRejection', () => {}) // the body of a cut stream, which it forgets
await serve((given, print) => {
  const headers = given.token ? {Authorization: `Bearer ${given.token}`} : {}
  return clients[process.argv[2]]({url: `${given.base}/api/ag-ui`, headers, given, print})
})
