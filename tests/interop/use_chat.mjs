// `useChat` as its manual has it, mounted twice as React does while developing; `window.given` may say where and who.
import {useChat} from '@ai-sdk/react'
import {DefaultChatTransport} from 'ai'
import {createElement, StrictMode, useEffect} from 'react'
import {createRoot} from 'react-dom/client'

const {id, resume, options = {}} = window.given
window.shown = []

function Chat() {
  const chat = useChat({id, resume, transport: new DefaultChatTransport(options)})
  useEffect(() => { // what is rendered may be thrown away; what is mounted counts
    window.chat = chat
    window.shown = chat.messages.map(({role, parts}) => ({
      role, texts: parts.filter(({type}) => type === 'text').map(({text}) => text),
    }))
  })
  return createElement('p', null, chat.status)
}

createRoot(document.body).render(createElement(StrictMode, null, createElement(Chat)))
