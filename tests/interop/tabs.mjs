// Many clients in one process: {"tab": n, "given": …} opens one, {"tab": n, "do": …} is a command to it, a line of JSON each.
// Prints what each of them sees, with its tab; `open` makes a client's commands of what it has to know.
import {createInterface} from 'node:readline'

export async function serve(open) {
  const tabs = new Map()
  for await (const line of createInterface({input: process.stdin})) {
    const {tab, given, ...command} = JSON.parse(line)
    const print = (seen) => console.log(JSON.stringify({tab, ...seen}))
    if (given) {
      tabs.set(tab, Promise.resolve(open(given, print)))
      continue
    }
    tabs.get(tab).then((commands) => commands[command.do](command))
      .then(() => print({done: command.do}), (error) => print({failed: error.message}))
  }
}
