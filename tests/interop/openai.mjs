// OpenAI's own package for Node.js: a completion whole and streamed, an unknown model, a model that fails; one JSON line.
import OpenAI from 'openai'

const given = JSON.parse(process.argv[2])
const client = new OpenAI({baseURL: `${given.base}/v1`, apiKey: given.key, maxRetries: 0})
const messages = [{role: 'user', content: given.content}]
const failed = (work) => work.then(() => null, ({message, status, code}) => ({message, status, code}))

const whole = await client.chat.completions.create({model: 'demo', messages})
const streamed = []
for await (const chunk of await client.chat.completions.create({model: 'demo', messages, stream: true}))
  streamed.push(chunk.choices[0]?.delta.content ?? '')
const models = []
for await (const model of client.models.list()) models.push(model.id)
console.log(JSON.stringify({
  whole: whole.choices[0].message.content,
  finish: whole.choices[0].finish_reason,
  streamed: streamed.join(''),
  pieces: streamed.length,
  models,
  unknown: await failed(client.chat.completions.create({model: 'none', messages})),
  failing: await failed((async () => {
    const failing = {model: 'demo', stream: true, messages: [{role: 'user', content: '/fail 2'}]}
    for await (const _ of await client.chat.completions.create(failing));
  })()),
}))
