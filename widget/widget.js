(() => {
if (customElements.get('parley-chat')) return
const SCRIPT = document.currentScript
let STRINGS
try {
	STRINGS = JSON.parse(SCRIPT.dataset.strings || '{}')
} catch {
	console.warn('data-strings is not JSON')
}
const words = {
	title: 'Chat', open: 'Open chat', close: 'Close', write: 'Write a message', send: 'Send', again: 'Try again',
	offline: 'Offline', lost: 'This chat cannot be reached.', ...STRINGS,
}
const ICONS = {
	open: 'M3 5h18v11H11l-5 4v-4H3z', close: 'M6 6l12 12M18 6 6 18', reset: 'M12 5v14M5 12h14',
	send: 'M12 19V5m-6 6 6-6 6 6', stop: 'M7 7h10v10H7z', copy: 'M9 9h11v11H9zM5 15H4V4h11v1',
	again: 'M20 11a8 8 0 1 0-2 6M20 5v6h-6', like: 'M4 11h3v9H4zm3 0 4-8q3 0 2 6h6l-2 11H7',
}
ICONS.dislike = ICONS.like
ICONS.latest = ICONS.send
ICONS.unread = ICONS.open

// -- trees

// what: tag.class.class
const h = (what, set, ...kids) => {
	const [tag, ...classes] = what.split('.')
	return {tag, set: {...classes[0] && {class: classes.join(' ')}, ...set}, kids: kids.flat(9).filter((each) => each && each !== true)}
}
const icon = (name) => h('svg', {viewBox: '0 0 24 24'}, h('path', {d: ICONS[name]}))
const button = (name, onclick, look = 'icon', text, more) => h(`button.${look}`, {title: words[name], onclick, ...more}, text || icon(name))
const plain = (name, onclick) => button(name, onclick, 'plain', words[name])
const copying = (text) => navigator.clipboard && button('copy', (event, node) => navigator.clipboard.writeText(text)
	.then(() => node.textContent = '✓', () => node.textContent = '✗'))

// Make `parent`, from `node` on, `trees`.
const show = (parent, trees, node = parent.firstChild) => {
	const skip = () => {
		const gone = node
		node = node.nextSibling
		gone.remove()
	}
	for (const tree of trees) {
		const {tag, set, kids} = tree, key = set?.key
		let fit = node
		while (key && fit && fit.key !== key) fit = fit.nextSibling
		if (fit && fit.key === key && fit.tag === tag) while (node !== fit) skip()
		else {
			fit = tag ? /svg|path/.test(tag) ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag) : new Text()
			parent.insertBefore(fit, node)
			Object.assign(fit, {tag, key})
		}
		if (tag) {
			for (const name in {...fit.set, ...set}) {
				const value = set[name]
				if (value === fit.set?.[name]) continue
				if (/^on/.test(name)) fit[name] = (event) => void value(event, fit) // false would prevent the default
				else value == null ? fit.removeAttribute(name) : fit.setAttribute(name, value)
				if (name === 'class') fit.part = value || ''
			}
			fit.set = set
			set.onshow ? set.onshow(fit) : show(fit, kids)
		} else if (fit.data !== tree) fit.data = tree
		node = fit.nextSibling
	}
	while (node) skip()
}

// -- Markdown → trees

const SPAN = /\\([^\w\s])|(`+)([^]{0,999}?[^`])\2(?!`)|!?\[([^\]]*)\]\(\s*([^\s)]*)[^)]*\)|(\*\*|__|~~|\*|(?<!\w)_)(?=\S)([^]{0,999}?[^\s\\])\6(?![*\w])|(https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?*_])/g
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/, FENCE = /^ *(```+|~~~+) *([^`]*)$/, RULE = /^ *([-*_])( *\1){2,} *$/
const HEADING = /^(#{1,6}) +(.*)$/, QUOTE = /^ {0,3}> ?/, DASHES = /^[ |:-]*-[ |:-]*$/
let top // level of the first heading
const starts = (line) => [ITEM, FENCE, RULE, HEADING, QUOTE].some((each) => each.test(line))
const cells = (row) => row.trim().replace(/^\||\|$/g, '').split(/ *(?<!\\)\| */).map((each) => each.replace(/\\\|/g, '|'))
const link = (url, kids) => /^(https?:\/\/|mailto:)/i.test(url) ? h('a', {href: url, target: '_blank', rel: 'noopener nofollow'}, kids) : kids

const shown = (url) => SCRIPT.dataset.images?.split(',').includes(/^https:\/\/([^/]+)\//.exec(url)?.[1])

const spans = (text) => {
	const out = []
	let from = 0
	for (const found of text.matchAll(SPAN)) {
		const [all, escaped, , code, label, url, mark, inner, bare] = found
		out.push(text.slice(from, found.index), escaped || (code ? h('code', {}, code)
			: bare ? link(bare, bare) : mark ? h(mark === '~~' ? 'del' : mark[1] ? 'strong' : 'em', {}, spans(inner))
			: all[0] !== '!' ? link(url, spans(label)) : shown(url) ? h('img', {alt: label, loading: 'lazy', referrerpolicy: 'no-referrer', src: url}) : link(url, label || url)))
		from = found.index + all.length
	}
	return [...out, text.slice(from)]
}

// Close what is open, hide half a link.
const mend = (text) => ['`', '**'].reduce((all, mark) => all.split(mark).length % 2 ? all : all.endsWith(mark) ? all.slice(0, -mark.length) : all + mark,
	text.replace(/!?\[([^\]\n]*)(\](\([^)\n]*)?)?$/, '$1'))

// `live`: the last line may go on.
const blocks = (lines, live) => {
	const out = [], end = lines.length
	let i = 0
	const take = (test) => {
		const from = i
		while (i < end && test(lines[i])) i++
		return lines.slice(from, i)
	}
	const inline = (text) => spans(live && i >= end ? mend(text) : text)
	const inside = (part, last = true) => blocks(part, last && live && i >= end)
	const block = (line, at) => {
		let found = FENCE.exec(line)
		if (found) {
			const code = take((each) => !each.trim().startsWith(found[1])).join('\n')
			i++
			return h('div.code', {}, h('div', {}, found[2], copying(code)), h('pre', {tabindex: 0}, h('code', {}, code)))
		}
		if (found = HEADING.exec(line)) return h('h' + ('345666'[found[1].length - top] || 3), {}, inline(found[2]))
		if (RULE.test(line)) return h('hr')
		if (QUOTE.test(line)) return h('blockquote', {}, inside([line, ...take((each) => each.trim() && (QUOTE.test(each) || !starts(each)))].map((each) => each.replace(QUOTE, ''))))
		if (found = ITEM.exec(line)) {
			const base = found[1].length, kind = found[2].slice(-1), items = [], number = parseInt(found[2])
			let width, blank
			i = at
			take((each) => {
				const item = ITEM.exec(each), indent = each.search(/\S/), bare = blank
				blank = indent < 0
				if (item?.[1].length < base + 2) {
					width = base + item[2].length + 1
					return item[2].slice(-1) === kind && items.push([item[3]])
				}
				return (blank || indent > base || !bare && !starts(each)) && items.at(-1).push(each.slice(Math.min(Math.max(0, indent), width)))
			})
			return h(number >= 0 ? 'ol' : 'ul', {start: number > 1 ? number : null}, items.map((part, k) => {
				const [first, ...rest] = inside(part, !items[k + 1])
				return h('li', {}, first?.tag === 'p' ? first.kids : first, rest)
			}))
		}
		if (line.includes('|') && (i < end ? DASHES.test(lines[i]) : live && line[0] === '|')) {
			const sides = cells(lines[i++] || '').map((each) => /^-+:$/.test(each) ? '.end' : '')
			const row = (tag, text) => h('tr', {}, cells(text).map((each, k) => h(tag + (sides[k] || ''), {}, inline(each))))
			return h('div.scroll', {tabindex: 0}, h('table', {}, h('thead', {}, row('th', line)), h('tbody', {}, take((each) => each.includes('|')).map((each) => row('td', each)))))
		}
		take((each) => each.trim() && !starts(each) && !(each.includes('|') && DASHES.test(lines[i + 1])))
		return h('p', {}, inline(lines.slice(at, i).join('\n')))
	}
	while (i < end) if (lines[i++].trim()) out.push({at: i - 1, ...block(lines[i - 1], i - 1)})
	return out
}

const prose = (root) => {
	let known = '', from = 0, kept = 0
	return (text, live) => {
		if (!text.startsWith(known)) from = kept = 0
		known = text
		top = /^#+(?= )/m.exec(text)?.[0].length
		const lines = text.slice(from).split('\n'), found = blocks(lines, live)
		show(root, found, root.childNodes[kept] ?? null)
		const open = found.findLastIndex(({at}) => at < lines.length - 1)
		if (open > 0) {
			from += lines.slice(0, found[open].at).join('\n').length + 1
			kept += open
		}
	}
}

const sheet = new CSSStyleSheet(), screen = new CSSStyleSheet()
sheet.replaceSync(`
:host{all:initial!important;display:contents!important}
:host([hidden]){display:none!important}
*{box-sizing:border-box;margin:0;padding:0}
section{--a:var(--parley-accent,light-dark(#0b5d63,#6ad0c7));--on:var(--parley-on-accent,var(--bg));--bg:var(--parley-surface,light-dark(#fffdf9,#15181b));--fg:var(--parley-text,light-dark(#1c1f22,#e9e6e0));--r:var(--parley-radius,14px);--b:light-dark(#a63d17,#f3a581);--mute:color-mix(in oklab,var(--fg) 70%,var(--bg));--tint:color-mix(in oklab,var(--fg) 5%,var(--bg));--edge:1px solid color-mix(in oklab,var(--fg) 16%,var(--bg));color-scheme:var(--parley-scheme,light dark);color:var(--fg);font:1em/1.55 var(--parley-font,system-ui,sans-serif);overflow-wrap:anywhere}
.bubble,dialog.panel{position:fixed;z-index:2147483647;inset:auto;inset-block-end:20px;inset-inline-end:20px}
button,textarea{font:inherit;color:inherit;background:none;border:1px solid #0000;border-radius:9px}
button{cursor:pointer;min-width:28px;min-height:28px}
:focus-visible:not(textarea),.composer:focus-within,.won{outline:2px solid var(--a);outline-offset:2px}
svg{width:1.25em;display:block;margin:auto;fill:none;stroke:currentColor;stroke-width:1.8;stroke-linecap:round;stroke-linejoin:round}
.launcher,.send,.latest{width:36px;height:36px;border-radius:50%;background:var(--a);color:var(--on)}
.launcher{width:56px;height:56px;font-size:1.4em}
.panel{display:flex;flex-direction:column;height:var(--parley-height,34em);border:var(--edge);border-radius:var(--r);background:var(--bg);color:inherit;overflow:hidden;position:relative}
dialog:not([open]){display:none}
dialog.panel{inset-block-end:88px;width:min(var(--parley-width,var(--w,25em)),100vw - 40px);height:min(var(--parley-height,40em),100dvh - 108px);max-width:none;max-height:none;box-shadow:0 16px 60px #0003}
.arena{--w:58em}
header,.alert,.acts,.note,.code div{display:flex;align-items:center;gap:4px}
.alert,.code div{justify-content:space-between}
header,.alert{padding:10px;padding-inline-start:16px;border-block-end:var(--edge)}
header div{flex:1}
h2,.hello{font:600 1.1em/1.3 var(--parley-font,Georgia,serif)}
.hello{font-size:1.5em}
.state,.note,.by,.vote,.code div,.plain,table{font-size:.9em}
.state,.note,.by,.vote,.code div,.icon,.pending,::placeholder{color:var(--mute)}
.bad,.alert{color:var(--b)}
.state:not(:empty){animation:blink .3s .4s backwards}
.pending{animation:blink 1.5s infinite}
.unread{border:6px solid var(--b)}
.icon:hover,.plain:hover,.on{color:var(--a);background:var(--tint)}
.log{display:flex;flex-direction:column;flex:1;overflow:auto;overscroll-behavior:contain;padding:18px 16px 8px;gap:14px}
.log,pre,.composer:focus-within{outline-offset:-2px}
.empty{margin:auto 0;display:grid;gap:8px;justify-items:start}
.plain{border:var(--edge);padding:6px 12px;color:var(--fg)}
.you,.log>.note{align-self:end}
.you{max-width:85%;padding:8px 14px;border:1px solid #0000;border-radius:var(--r);border-end-end-radius:4px;background:color-mix(in oklab,var(--a) 16%,var(--bg))}
.you,.prose p{white-space:pre-line}
.pair,.votes{display:grid;gap:8px;grid-template-columns:repeat(auto-fit,minmax(var(--min,250px),1fr))}
.votes{--min:120px}
.pair>*{border:var(--edge);border-radius:var(--r);border-block-start:3px solid var(--a);padding:12px 16px;min-width:0}
.b{border-block-start-color:var(--b)}
.by{font-weight:600}
textarea,.prose *{unicode-bidi:plaintext}
.prose>*+*,li>*+*,blockquote>*+*{margin-block-start:.7em}
ul,ol{padding-inline-start:1.5em}
a{color:var(--a)}
blockquote{border-inline-start:3px solid var(--mute);padding-inline-start:12px}
code{font:.9em ui-monospace,monospace}
th,code,.code div{background:var(--tint)}
.code,.scroll{border:var(--edge);border-radius:9px;overflow:auto}
.code div{padding-inline-start:12px}
pre{overflow:auto;padding:10px 12px;direction:ltr}
pre code{background:none}
h5,h6{font-size:1em}
table{border-collapse:collapse;width:100%;overflow-wrap:normal;color:inherit}
img{max-width:100%}
th,td{padding:6px 12px;text-align:start}
td{border-block-start:var(--edge)}
.end{text-align:end}
.vote{text-align:center}
.acts{flex-wrap:wrap}
.acts svg{width:1em}
.dislike svg,.latest svg{rotate:180deg}
.latest{position:absolute;inset:auto 0 76px;margin:auto}
.composer{display:flex;align-items:end;gap:4px;margin:10px 12px 12px;padding:5px;padding-inline-start:14px;border:1px solid var(--mute);border-radius:23px}
textarea{flex:1;min-width:0;border:0;outline:0;resize:none;padding:5px 0;max-height:9em;field-sizing:content}
.sr{position:absolute;clip-path:inset(50%)}
@keyframes blink{from,to{opacity:.2}}
@media(max-width:480px){dialog.panel{inset:var(--top,0) 0 auto;width:100%;height:var(--high,100dvh);border:0;border-radius:0}}
@media print{.bubble{display:none}}
@media(prefers-reduced-motion){*{animation:none!important}}`)
// what a phone's keyboard leaves
const fit = () => screen.replaceSync(`section{--high:${visualViewport.height}px;--top:${visualViewport.offsetTop}px}`)

const sentence = ({code, message, retry_after}) => (words[code] || code && message || words.lost) + (retry_after ? ` ${retry_after} s` : '')
const isRunning = ({status}) => /pending|streaming/.test(status)

customElements.define('parley-chat', class extends HTMLElement {
	option(name) {
		return this.getAttribute(name) ?? this.dataset[name] ?? SCRIPT.dataset[name]
	}

	connectedCallback() {
		if (this.root) return this.begun && this.connect()
		this.root = this.attachShadow({mode: 'open'})
		this.root.adoptedStyleSheets = [sheet, screen]
		this.mode = this.option('mode') || 'direct'
		this.arena = this.mode !== 'direct'
		this.inline = this.option('inline') != null
		this.base = new URL(SCRIPT.src).origin
		this.place = {}
		try {
			this.place = window[`${this.option('remember') || 'local'}Storage`] || {}
		} catch {}
		this.clear()
		this.draw()
		if (this.inline) this.begin()
		else if (this.option('open') != null) this.toggle()
	}

	disconnectedCallback() {
		this.drop()
	}

	// Before, nothing is asked or kept.
	async begin() {
		if (this.begun) return
		this.begun = true
		addEventListener('online', () => this.check())
		addEventListener('offline', () => this.drop(1006))
		addEventListener('storage', ({key}) => key === this.base && this.id !== this.session && !this.making && this.connect(this.clear()))
		addEventListener('visibilitychange', () => this.check())
		visualViewport.onresize = visualViewport.onscroll = fit
		fit()
		try {
			this.shared = this.option('shared')
			if (this.shared) this.sharedId = (await this.api(this.path)).session.id
			this.connect()
			Object.assign(words, await this.api('widget/'), STRINGS)
		} catch (problem) {
			if (this.shared) this.end(problem)
		}
		this.changed()
	}

	emit(name, detail) {
		return this.dispatchEvent(new CustomEvent(`chat:${name}`, {detail, bubbles: true, cancelable: true}))
	}

	$(selector) {
		return this.root.querySelector(selector)
	}

	// -- for a page

	toggle(open = !this.$('dialog')?.open) {
		const panel = this.$('dialog')
		if (!panel || open === panel.open) return
		if (!open) return panel.close()
		this.begin()
		panel[matchMedia('(max-width:480px)').matches ? 'showModal' : 'show']()
		this.draw()
		this.$('textarea').focus()
		this.emit('open')
	}

	send(text) {
		text = text.trim()
		if (text.length > words.longest) return this.refuse(0, {code: 'too_large'})
		if (!text || this.running || !this.emit('send', {text})) return false
		this.follows = true
		this.say(text)
		return true
	}

	stop() {
		return this.act(`${this.path}stop/`)
	}

	reset() {
		if (this.running) this.stop()
		this.keep({[this.mode]: undefined})
		this.clear()
	}

	// -- the conversation

	clear() {
		this.drop()
		this.messages = new Map()
		this.tries = 0
		this.follows = true
		this.cursor = this.session = this.problem = null
		this.become('new')
	}

	become(state) {
		this.state = state
		this.changed()
	}

	// draws a third of the time
	changed() {
		this.frame ||= setTimeout(() => requestAnimationFrame(() => this.draw()), this.cost * 2)
	}

	get list() {
		return [...this.messages.values()].sort((a, b) => a.position - b.position)
	}

	get running() {
		return this.list.some(isRunning)
	}

	// Never what was said.
	get keys() {
		return JSON.parse(this.place[this.base] || '{}')
	}

	keep(change) {
		const kept = {[this.base]: JSON.stringify({...this.keys, ...change})}
		try {
			Object.assign(this.place, kept)
		} catch {
			this.place = kept // full
		}
	}

	get id() {
		return this.sharedId || this.keys[this.mode]
	}

	get path() {
		return this.shared ? `shared/${this.shared}/` : `sessions/${this.id}/`
	}

	async api(path, body) {
		const {guest} = this.keys
		const answer = await fetch(`${this.base}/api/${path}`, {method: body ? 'POST' : 'GET', body: body && JSON.stringify(body), headers: guest && {'X-Anonymous-Token': guest}})
		if (answer.status === 401) this.place[this.base] = '{}'
		if (!/json/.test(answer.headers.get('content-type'))) return answer.body.cancel()
		const said = await answer.json()
		if (!answer.ok) throw {...said, code: said.error}
		return said
	}

	act(path, body = {}) {
		this.problem = null
		return this.api(path, body).catch((problem) => this.refuse(0, problem)).finally(() => this.tell('request_state'))
	}

	async make() {
		this.keys.guest || this.keep({guest: (await this.api('auth/anonymous/', {})).anonymous_token})
		const [model_a_id, model_b_id] = this.option('model')?.split(',') || []
		this.id || this.keep({[this.mode]: (await this.api('sessions/', {mode: this.mode.replace('arena', 'random'), model_a_id, model_b_id})).id})
	}

	connect() {
		clearTimeout(this.timer)
		if (this.socket || this.state === 'over' || !this.id || !this.isConnected) return
		const socket = this.socket = new WebSocket(`${this.base}/ws/chat/session/${this.id}/?cursor=${this.cursor || ''}&share_token=${this.shared || ''}`,
			this.shared ? 'parley.v1' : ['parley.v1', `t.${this.keys.guest}`])
		socket.onopen = () => this.become('syncing')
		socket.onmessage = ({data}) => {
			this.heard = true
			if (socket === this.socket) this.hear(JSON.parse(data))
		}
		socket.onclose = ({code}) => socket === this.socket && this.closed(code)
		this.become('connecting')
	}

	closed(code) {
		this.socket = null
		if (/440[14]/.test(code)) this.keep({[this.mode]: undefined, ...code === 4401 && {guest: undefined}})
		if (/1009|440[0134]/.test(code)) return this.end({code})
		if (code === 4429) this.tries = 6
		this.timer = setTimeout(() => this.connect(), Math.random() * Math.min(3e4, 500 * 2 ** this.tries++))
		this.become('offline')
	}

	// After sleep a socket may be dead.
	check() {
		const {socket} = this
		this.tries = 0
		if (!socket) return this.timer && this.connect()
		this.heard = false
		this.tell('ping')
		setTimeout(() => socket === this.socket && !this.heard && this.drop(1006), 5e3)
	}

	drop(code) {
		const {socket} = this
		this.socket = null
		clearTimeout(this.timer)
		socket?.close()
		if (code && socket) this.closed(code)
	}

	end(problem) {
		this.refuse(0, problem)
		this.become('over')
	}

	// `size`: code points, as offsets
	put(message, text = message.content, size = [...text].length) {
		this.messages.set(message.id, {...this.messages.get(message.id), ...message, text, size})
	}

	hear(event) {
		const {type, turn_id: turn, message: said} = event, message = this.messages.get(event.message_id)
		if (type === 'session_state') {
			const [first] = event.messages, joined = this.messages.has(first?.id)
			this.list.forEach(({id, position, status}) => status === 'sending' || joined && position < first.position || this.messages.delete(id))
			event.messages.forEach((each) => this.put(each))
			this.session = event.session.id
			this.cursor = event.turn?.cursor
		}
		if (/state|resumed/.test(type)) {
			this.tries = 0
			this.become('live')
		}
		if (said?.id) this.put({...said, turn})
		if (type === 'message_complete') this.unread = this.emit('message', said)
		if (type === 'message_chunk' && message) {
			const over = message.size - event.offset
			if (over < 0) return this.drop(1006)
			const fresh = [...event.chunk].slice(over)
			this.put({...message, status: 'streaming'}, message.text + fresh.join(''), message.size + fresh.length)
		}
		if (type === 'turn_complete') {
			const texts = this.list.filter((each) => each.turn === turn && each.role !== 'user')
			this.said = `${words.done} ${texts[1] ? '' : texts[0]?.text}`
		}
		if (type === 'session_update') {
			if (event.action === 'deleted') return this.drop(4404)
			this.tell('request_state')
		}
		if (type === 'error' && !/busy|draining/.test(event.code)) this.refuse(event.message_id, event) // those wait
		this.cursor = event.cursor || this.cursor
		if (/state|resumed|turn/.test(type)) this.flush()
		this.changed()
	}

	refuse(id, problem) {
		const message = this.messages.get(id)
		if (message) this.messages.set(id, {...message, status: 'refused', problem})
		else this.problem = problem
		this.emit('error', problem)
		this.changed()
	}

	tell(type, more) {
		if (this.socket?.readyState === 1) this.socket.send(JSON.stringify({type, ...more}))
	}

	// The same id twice is one message.
	flush() {
		const waiting = this.list.find(({status}) => status === 'sending')
		if (waiting && this.state === 'live' && !this.running) this.tell('message', {content: waiting.text, id: waiting.id})
	}

	async say(text, id = `${Math.random()}`.slice(2)) {
		if (this.state === 'over') this.clear()
		this.put({id, role: 'user', status: 'sending', position: 1e9, problem: null}, text)
		this.problem = this.said = null
		this.changed()
		try {
			await (this.making ||= this.make().finally(() => this.making = null))
			this.connect()
			this.flush()
		} catch (problem) {
			this.refuse(id, problem)
		}
	}

	async earlier() {
		const found = await this.act(`${this.path}?before=${this.list[0].position}`, null)
		const log = this.$('.log'), rest = log.scrollHeight - log.scrollTop
		found?.messages.forEach((each) => this.put(each))
		this.follows = false
		this.draw()
		log.scrollTop = log.scrollHeight - rest
	}

	async vote(message_id, preference, feedback_type = 'preference') {
		if (await this.act('feedback/', {session_id: this.id, message_id, feedback_type, preference})) this.emit('vote', {message_id, preference})
	}

	// -- how it looks

	draw() {
		const start = performance.now(), {state, problem, inline, shared} = this, opened = !!this.$('dialog')?.open, focused = this.root.activeElement, title = this.option('title') || words.title
		this.frame = 0
		if (opened) this.unread = false
		const kids = [
			h('header', {}, h('div', {}, h('h2', {}, title), h('div.state', {role: 'status'}, words[state])),
				this.messages.size && !shared && button('reset', () => this.reset()), inline || button('close', () => this.toggle())),
			this.log(),
			this.follows || button('latest', () => this.down(this.follows = true), 'latest'),
			problem && h('div.alert', {role: 'alert'}, sentence(problem), button('close', () => this.changed(this.problem = null))),
			!shared && this.composer(),
			h('div.sr', {role: 'status'}, this.said),
		]
		show(this.root, [h(`section.${inline ? 'inline' : 'bubble'}.${this.arena && 'arena'}`, {'aria-label': title, lang: this.option('lang')}, inline ? h('div.panel', {}, kids) : [
			button(opened ? 'close' : this.unread ? 'unread' : 'open', () => this.toggle(), `launcher.${this.unread && 'unread'}`, null, {'aria-expanded': opened}),
			h('dialog.panel', {'aria-label': title, onkeydown: ({keyCode}) => keyCode === 27 && this.toggle(false), onclose: () => {
				this.draw()
				this.$('.launcher').focus()
			}}, kids),
		])])
		if (focused && !this.root.activeElement) this.$('.log').focus() // its button is gone
		if (this.follows) this.down()
		this.cost = performance.now() - start
	}

	down() {
		this.$('.log').scrollTop = 1e9
	}

	log() {
		const turns = []
		for (const each of this.list) each.parent_message_ids?.[0] ? turns.at(-1)?.push(each) : turns.push([each])
		return h('div.log', {role: 'log', 'aria-live': 'off', 'aria-label': words.log, tabindex: 0, onscroll: ({target}) => {
			const follows = target.scrollHeight - target.scrollTop - target.clientHeight < 40
			if (follows !== this.follows) this.changed(this.follows = follows)
		}}, turns[0]?.[0].position % 1e9 && button('earlier', () => this.earlier(), 'plain.earlier', words.earlier), turns.map((turn, i) => this.turn(turn, !turns[i + 1])), !turns[0] && !this.shared && h('div.empty', {},
			h('p.hello', {}, this.option('greeting') || (this.arena ? words.battle : words.greeting)),
			(this.option('suggestions')?.split('|') || words.suggestions)?.map((text) => button(0, () => this.send(text), 'plain', text))))
	}

	turn(turn, last) {
		const [user] = turn, {id, text, status, problem} = user, replies = turn.filter(({role}) => role !== 'user'), pair = replies.length > 1
		return [
			user === replies[0] || h('article.you', {key: id, 'aria-label': words.you, dir: 'auto'}, text),
			status === 'sending' && this.state !== 'live' && h('div.note', {}, words.sending),
			problem && h('div.note.bad', {role: 'alert'}, sentence(problem), plain('again', () => this.say(text, id))),
			replies[0] && h(pair ? 'div.pair' : 'div', {key: id + '+'}, replies.map((reply) => this.reply(reply, user, pair, last))),
			pair && !this.shared && replies.every((reply) => reply.status === 'success') && h('div.vote', {}, user.feedback ? words.voted : [words.which,
				h('div.votes', {}, ['model_a', 'model_b', 'tie', 'both_bad'].map((each) => plain(each, () => this.vote(id, each))))]),
		]
	}

	reply(reply, user, pair, last) {
		const {id, status, participant, text, feedback, model} = reply, running = isRunning(reply), good = status === 'success', person = model?.id === 'person'
		const won = pair && user.feedback === `model_${participant}`, name = model?.display_name || words.model, again = () => this.act(`messages/${id}/regenerate/`)
		if (person && user !== reply) return last && h('div.note', {}, text) // who will answer
		return h(`article.reply.${participant}.${won && 'won'}`, {key: id, 'aria-label': name},
			(pair || person) && h('div.by', {}, name, won && ' ✓'),
			running && !text && h('div.pending', {}, words.pending),
			h('div.prose', {dir: 'auto', onshow: (node) => (node.write ||= prose(node))(text, running)}),
			running || h('div.acts', {},
				good || h('span.note.bad', {}, words[reply.failure_reason || status]),
				text && copying(text),
				last && !this.shared && !person && [
					status === 'interrupted' && !pair && plain('more', () => this.send(words.more)),
					!user.feedback && (good ? !pair && button('again', again) : plain('again', again)),
				],
				good && !pair && !this.shared && ['like', 'dislike'].map((each) => button(each, () => this.vote(id, each, 'rating'), `icon.${each}.${feedback === each && 'on'}`, null, {'aria-pressed': feedback === each}))))
	}

	composer() {
		const {running} = this, submit = (event) => {
			event.preventDefault()
			const box = this.$('textarea')
			if (this.send(box.value)) box.value = ''
		}
		return h('div.composer', {key: 'composer'},
			h('textarea', {rows: 1, enterkeyhint: 'send', placeholder: words.write, 'aria-label': words.write,
				// 229 is an input method's Enter.
				onkeydown: (event) => event.keyCode === 13 && !event.shiftKey && submit(event)}),
			button(running ? 'stop' : 'send', running ? () => this.stop() : submit, 'send'))
	}
})

const begin = () => document.querySelector('parley-chat') || document.body.append(document.createElement('parley-chat'))
document.readyState === 'loading' ? addEventListener('DOMContentLoaded', begin) : begin()
})()
