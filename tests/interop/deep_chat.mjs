// deep-chat as the README has it.
import 'deep-chat'

const chat = document.createElement('deep-chat')
chat.connect = {url: '/api/messages/stream/?format=sse', method: 'POST', stream: true}
chat.requestInterceptor = (request) => {
  request.body = {session_id: window.given.id, content: request.body.messages.at(-1).text}
  return request
}
chat.responseInterceptor = (event) => ({text: event.chunk ?? ''})
chat.onError = (error) => (window.problem = `${error}`)
document.body.append(chat)
window.chat = chat
