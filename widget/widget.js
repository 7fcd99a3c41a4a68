/* Parley's chat widget: one file, no dependency, served as it is read. Everything is made of DOM nodes and adopted style
   sheets, so that it runs under `default-src 'none'` with Trusted Types `'none'`. See "Embed" in the README. */
(() => {
  const script = document.currentScript;
  const WORDS = {
    title: 'Chat', open: 'Open chat', close: 'Close', unread: 'New answer', reset: 'New chat', hello: 'Ask me anything',
    battle: 'Two models answer. You choose.', intro: 'Answers appear as they are written.', blind: 'Their names stay hidden until you vote.',
    write: 'Write a message', send: 'Send', stop: 'Stop', log: 'Conversation', you: 'You', model: 'Assistant', thinking: 'Thinking',
    queued: 'Waiting for the connection', latest: 'Show the latest', earlier: 'Show earlier messages', connecting: 'Connecting',
    syncing: 'Catching up', offline: 'Offline, trying again', over: 'This chat has ended.', unreachable: 'No connection just now.',
    copy: 'Copy', copied: 'Copied', again: 'Try again', go_on: 'Continue', like: 'Good answer', dislike: 'Bad answer',
    model_a: 'A is better', model_b: 'B is better', tie: 'Tie', both_bad: 'Both are bad', which: 'Which answer is better?',
    voted: 'Thank you for your vote.', pick: 'Your pick', done: 'Answer finished', stopped: 'Stopped', interrupted: 'Interrupted',
    failed: 'No answer came', wait: 'Possible again in {} s.', image: 'Image', code: 'Code', table: 'Table',
  };
  const ICONS = {
    open: 'M4 4h11a2 2 0 0 1 2 2v6a2 2 0 0 1-2 2H9l-4 3v-3H4a2 2 0 0 1-2-2V6a2 2 0 0 1 2-2Zm16 5a2 2 0 0 1 2 2v6a2 2 0 0 1-2 2v3l-4-3h-4',
    close: 'M6 6l12 12M18 6 6 18', reset: 'M12 5v14M5 12h14', send: 'M12 19V5m-6 6 6-6 6 6', latest: 'M12 5v14m-6-6 6 6 6-6', stop: 'M7 7h10v10H7z',
    copy: 'M9 9h11v11H9zM5 15H4V4h11v1', again: 'M20 11a8 8 0 1 0-2 6M20 5v6h-6', like: 'M4 11h3v9H4zm3 0 4-8q3 0 2 6h6l-2 11H7', dislike: 'M4 13h3V4H4zm3 0 4 8q3 0 2-6h6L17 4H7',
  };

  // -- trees: how a part of the page should look, and making it so

  const h = (tag, set, ...kids) => ({tag, set: set || {}, kids: kids.flat(9).filter((kid) => kid && kid !== true)});
  const icon = (name) => h('svg', {viewBox: '0 0 24 24', 'aria-hidden': true}, h('path', {d: ICONS[name]}));

  /** Make what `parent` holds from `node` on look like `trees`. Nodes that fit are kept; those with a key make way. */
  const show = (parent, trees, node = parent.firstChild) => {
    for (const tree of trees) {
      const {tag, set, kids} = tree;
      if (!node || node.tag !== tag || node.key !== set?.key) {
        const made = !tag ? new Text() : /svg|path/.test(tag) ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
        if (node && !node.key) node.replaceWith(made);
        else parent.insertBefore(made, node);
        node = made;
        node.tag = tag;
      }
      if (tag) {
        for (const name in {...node.set, ...set}) {
          const value = set[name];
          if (value === node.set?.[name]) continue;
          if (/^on/.test(name)) node[name] = value && ((event) => void value(event)); // false would prevent what the browser does
          else if (name === 'key') node.key = value;
          else if (value == null) node.removeAttribute(name);
          else node.setAttribute(name, value);
        }
        node.set = set;
        if (set.onshow) set.onshow(node);
        else show(node, kids);
      } else if (node.data !== tree) node.data = tree;
      node = node.nextSibling;
    }
    while (node) {
      const gone = node;
      node = node.nextSibling;
      gone.remove();
    }
  };

  // -- Markdown: text that grows → trees. `ui` makes what needs words or settings: code, images.

  const SPAN = new RegExp([
    /\\([^\w\s])/, /(`+)([^]{0,999}?[^`])\2(?!`)/, /(!?)\[((?:[^[\]]|\[[^\]]*\])*)\]\(\s*<?([^\s)>]*)>?(?:\s+"[^"]*")?\s*\)/,
    /(\*\*|__|~~|\*|(?<!\w)_)(?=\S)([^]{0,999}?[^\s\\])\7(?![*\w])/, /(https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?*_])/, /( {2,}\n|<br ?\/?>)/,
  ].map(({source}) => source).join('|'), 'g');
  const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/, FENCE = /^ *(```+|~~~+) *([^`]*)$/, RULE = /^ *([-*_])( *\1){2,} *$/;
  const HEADING = /^(#{1,6}) +(.*?) *#*$/, QUOTE = /^ {0,3}> ?/, DASHES = /^[ |:-]*-[ |:-]*$/;
  const starts = (line) => [ITEM, FENCE, RULE, HEADING, QUOTE].some((kind) => kind.test(line));
  const cells = (row) => row.trim().replace(/^\||\|$/g, '').split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, '|'));
  const link = (url, kids) => (/^(https?:\/\/|mailto:)/i.test(url) ? h('a', {href: url, title: url, target: '_blank', rel: 'noopener noreferrer nofollow'}, kids) : kids);

  const spans = (text, ui) => {
    const out = [];
    let from = 0;
    for (const found of text.matchAll(SPAN)) {
      const [all, escaped, , code, bang, label, url, mark, inner, bare] = found;
      out.push(text.slice(from, found.index), escaped || (code ? h('code', null, code.replace(/^ (.*) $/, '$1'))
        : bang ? ui.image(url, label) : url != null ? link(url, spans(label, ui))
        : mark ? h(mark === '~~' ? 'del' : mark[1] ? 'strong' : 'em', null, spans(inner, ui)) : bare ? link(bare, bare) : h('br')));
      from = found.index + all.length;
    }
    return [...out, text.slice(from)];
  };

  /** Close what is open in a text that is still being written, and hide half a link: nothing flickers. */
  const mend = (text) => ['`', '**'].reduce((all, mark) => (all.split(mark).length % 2 ? all : all.endsWith(mark) ? all.slice(0, -mark.length) : all + mark),
    text.replace(/!?\[([^\]\n]*)(\](\([^)\n]*)?)?$/, '$1'));

  /** Lines → `[number of the first line, tree]` of each block. `live`: the last line may go on. */
  const blocks = (lines, ui, live) => {
    const out = [], end = lines.length;
    let i = 0;
    const take = (test) => {
      const from = i;
      while (i < end && test(lines[i])) i++;
      return lines.slice(from, i);
    };
    const inline = (text) => spans(live && i >= end ? mend(text) : text, ui);
    const inside = (part) => blocks(part, ui, live && i >= end).map((block) => block[1]);
    while (i < end) {
      const at = i, line = lines[i++];
      let found;
      const row = (tag, text, sides) => h('tr', null, cells(text).map((cell, k) => h(tag, {class: sides[k]}, inline(cell))));
      const block = () => {
        if ((found = FENCE.exec(line))) {
          const code = take((each) => !each.trim().startsWith(found[1]));
          i++;
          return ui.code(found[2], code.join('\n'));
        }
        if ((found = HEADING.exec(line))) return h(found[1][3] ? 'h4' : 'h3', null, inline(found[2]));
        if (RULE.test(line)) return h('hr');
        if (QUOTE.test(line)) return h('blockquote', null, inside([line, ...take((each) => each.trim() && (QUOTE.test(each) || !starts(each)))].map((each) => each.replace(QUOTE, ''))));
        if ((found = ITEM.exec(line))) {
          const base = found[1].length, kind = found[2].slice(-1), items = [], number = parseInt(found[2], 10);
          let width, blank;
          i = at;
          take((each) => {
            const item = ITEM.exec(each), indent = each.search(/\S/), bare = blank;
            blank = indent < 0;
            if (item && item[1].length < base + 2) {
              if (item[2].slice(-1) !== kind) return false;
              width = base + item[2].length + 1;
              return items.push([item[3]]);
            }
            if (indent >= 0 && indent <= base && (bare || starts(each))) return false;
            return items.at(-1).push(each.slice(Math.min(Math.max(0, indent), width)));
          });
          return h(number >= 0 ? 'ol' : 'ul', {start: number > 1 ? number : null}, items.map((part, k) => {
            const [first, ...rest] = k < items.length - 1 ? blocks(part, ui).map((each) => each[1]) : inside(part);
            return h('li', null, first?.tag === 'p' ? first.kids : first, rest);
          }));
        }
        if (line.includes('|') && (i < end ? DASHES.test(lines[i]) : live && line[0] === '|')) {
          const sides = cells(lines[i++] || '').map((cell) => (cell.endsWith(':') ? cell[0] === ':' ? 'mid' : 'end' : null));
          return h('div', {class: 'scroll', tabindex: 0, role: 'group', 'aria-label': ui.words.table}, h('table', null, h('thead', null, row('th', line, sides)),
            h('tbody', null, take((each) => each.includes('|')).map((each) => row('td', each, sides)))));
        }
        take((each) => each.trim() && !starts(each) && !(each.includes('|') && DASHES.test(lines[i + 1])));
        return h('p', null, inline(lines.slice(at, i).join('\n')));
      };
      if (line.trim()) out.push([at, block()]);
    }
    return out;
  };

  /** Show Markdown that grows: what is finished is neither read nor touched again. */
  const prose = (root, ui) => {
    let known = '', from = 0, kept = 0; // characters and nodes that are finished
    return (text, live) => {
      if (!text.startsWith(known)) from = kept = 0;
      known = text;
      const lines = text.slice(from).split('\n'), found = blocks(lines, ui, live);
      show(root, found.map((block) => block[1]), root.childNodes[kept] ?? null);
      const open = found.findLastIndex(([at]) => at < lines.length - 1); // it has a whole line: those before it are finished
      if (open > 0) {
        from += lines.slice(0, found[open][0]).join('\n').length + 1;
        kept += open;
      }
    };
  };

  // -- the conversation: what is known of a session, and the socket that keeps it so

  const isRunning = ({status}) => /pending|streaming/.test(status);
  const size = (text) => text.length - (text.match(/[\uD800-\uDBFF]/g)?.length || 0); // in code points, as offsets are

  class Talk {
    constructor(base, wish, shared, remember) {
      Object.assign(this, {base, wish, shared, name: `parley ${base}`, place: {}});
      try {
        this.place = window[`${remember}Storage`] || {};
      } catch {} // a sandboxed page has none
      this.clear();
    }

    clear() {
      this.messages = new Map();
      this.before = [];
      this.tries = 0;
      this.cursor = this.session = this.problem = null;
      this.state = 'new';
    }

    get list() {
      return [...this.messages.values()].sort((a, b) => a.position - b.position);
    }

    get running() {
      return this.list.some(isRunning);
    }

    /** Kept on this machine: who the guest is, and which session this is; never what was said. */
    get keys() {
      return JSON.parse(this.place[this.name] || '{}');
    }

    keep(change) {
      this.place[this.name] = JSON.stringify({...this.keys, ...change});
    }

    get id() {
      return this.keys[this.wish.mode];
    }

    forget() {
      this.keep({[this.wish.mode]: undefined});
    }

    async api(path, body, method = 'POST') {
      const {guest} = this.keys;
      const answer = await fetch(`${this.base}/api/${path}`, {
        method, body, headers: {'Content-Type': 'application/json', ...guest && {'X-Anonymous-Token': guest}},
      }).catch(() => {
        throw {code: 'unreachable'};
      });
      if (answer.status === 401) this.keep({guest: undefined, [this.wish.mode]: undefined});
      if (!/json/.test(answer.headers.get('content-type'))) return answer.body.cancel(); // a stream: the socket tells it
      const said = await answer.json();
      if (!answer.ok) throw {...said, code: said.error};
      return said;
    }

    post(path, body = {}) {
      return this.api(path, JSON.stringify(body));
    }

    /** Be somebody in a session: at the first message, not before. */
    async make() {
      if (!this.keys.guest) this.keep({guest: (await this.post('auth/anonymous/')).anonymous_token});
      if (!this.id) this.keep({[this.wish.mode]: (await this.post('sessions/', this.wish)).id});
    }

    async start() {
      try {
        if (this.shared) Object.defineProperty(this, 'id', {value: (await this.api(`shared/${this.shared}/`, null, 'GET')).session.id});
        this.connect();
      } catch (problem) {
        this.end(problem);
      }
    }

    connect() {
      clearTimeout(this.timer);
      if (this.socket || this.state === 'over' || !this.id) return;
      const query = new URLSearchParams({...this.cursor && {cursor: this.cursor}, ...this.shared && {share_token: this.shared}}), {guest} = this.keys;
      const socket = this.socket = new WebSocket(`${this.base.replace('http', 'ws')}/ws/chat/session/${this.id}/?${query}`, ['parley.v1', ...this.shared || !guest ? [] : [`a.${guest}`]]);
      socket.onmessage = ({data}) => {
        this.heard = Date.now();
        if (socket === this.socket) this.hear(JSON.parse(data));
      };
      socket.onopen = () => this.become('syncing');
      socket.onclose = ({code}) => socket === this.socket && this.closed(code);
      this.become('connecting');
    }

    /** Come back after a pause that grows, no two tabs at the same moment; or stop where the code says so. */
    closed(code) {
      this.socket = null;
      if (/4401|4404/.test(code)) this.keep({[this.wish.mode]: undefined, ...code === 4401 && {guest: undefined}});
      if (/1003|1009|440[0134]/.test(code)) return this.end({code});
      if (code === 4429) this.tries = 6;
      this.timer = setTimeout(() => this.connect(), Math.random() * Math.min(30000, 500 * 2 ** this.tries++));
      this.become('offline');
    }

    /** Sleep and lost networks leave sockets that say nothing for ever: see whether anybody is there. */
    check() {
      const {socket} = this, asked = Date.now();
      this.tries = 0;
      if (!socket) return this.timer && this.connect();
      this.send({type: 'ping'});
      setTimeout(() => socket === this.socket && !(this.heard > asked) && this.drop(1006), 5000);
    }

    drop(code) {
      const {socket} = this;
      this.socket = null;
      clearTimeout(this.timer);
      socket?.close();
      if (code && socket) this.closed(code);
    }

    end(problem) {
      this.problem = problem;
      this.tell('error', problem);
      this.become('over');
    }

    become(state) {
      this.state = state;
      this.changed();
    }

    put(message, text = message.content) {
      const known = this.messages.get(message.id);
      this.messages.set(message.id, {...known, ...message, text, size: size(text)});
    }

    hear(event) {
      const {type, turn_id: turn} = event, message = this.messages.get(event.message_id);
      if (type === 'session_state') {
        const unsent = this.unsent;
        this.messages = new Map(this.before);
        event.messages.forEach((each) => this.put(each));
        unsent.forEach((each) => this.messages.has(each.id) || this.messages.set(each.id, each));
        this.session = event.session;
        this.cursor = event.turn?.cursor;
      }
      if (/session_state|resumed/.test(type)) {
        this.tries = this.asked = 0;
        this.state = 'live';
      } else if (type === 'message_update') {
        this.put({...event.message, turn});
      } else if (type === 'message_chunk' && message) {
        const over = message.size - (event.offset ?? message.size); // characters we have already
        if (over < 0) return this.asked ||= this.send({type: 'resume', cursor: this.cursor || ''});
        this.put({...message, status: 'streaming'}, message.text + (over ? [...event.chunk].slice(over).join('') : event.chunk));
      } else if (type === 'message_complete') {
        this.put({...event.message, turn});
        this.tell('message', event.message);
      } else if (type === 'turn_complete') {
        this.tell('turn', turn);
      } else if (type === 'session_update') {
        if (event.action === 'deleted') return this.drop(4404);
        this.session = event.session;
        if (event.action !== 'updated') this.send({type: 'request_state'}); // votes and names are in the messages
      } else if (type === 'error' && !/busy|draining/.test(event.code)) { // else what waits is sent again
        this.refuse(event.message_id, event);
      }
      if (event.cursor) this.cursor = event.cursor;
      if (this.state === 'live' && !this.running && /state|resumed|turn/.test(type)) this.flush();
      this.changed();
    }

    refuse(id, problem) {
      if (this.messages.has(id)) this.messages.set(id, {...this.messages.get(id), status: 'refused', problem});
      else this.problem = problem;
      this.tell('error', problem);
      this.changed();
    }

    send(frame) {
      if (this.socket?.readyState === 1) this.socket.send(JSON.stringify(frame));
      return 1;
    }

    get unsent() {
      return this.list.filter(({status}) => status === 'sending');
    }

    /** Send the first message that waits; the same id twice is one message. */
    flush() {
      const [first] = this.unsent;
      if (first) this.send({type: 'message', content: first.text, id: first.id});
    }

    async say(text, id = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => (byte + 256).toString(16).slice(1)).join('')) {
      if (this.state === 'over') this.clear();
      this.problem = null;
      this.put({id, role: 'user', status: 'sending', position: 1e9, problem: null}, text);
      this.changed();
      try {
        await (this.making ||= this.make().finally(() => (this.making = null)));
        this.connect();
        if (this.state === 'live') this.flush();
      } catch (problem) {
        this.refuse(id, problem);
      }
    }

    async act(path, body) {
      this.problem = null;
      try {
        return await this.post(path, body) || true;
      } catch (problem) {
        this.refuse(null, problem);
        this.send({type: 'request_state'}); // it was not as it looked here
      }
    }

    async earlier() {
      const {messages} = await this.api(`sessions/${this.id}/?before=${this.list[0].position}`, null, 'GET');
      messages.forEach((each) => this.put(each));
      this.before = [...this.messages].filter(([, each]) => each.position < 1e9 && !isRunning(each));
      this.changed();
    }

    reset() {
      if (this.running) this.stop();
      this.drop();
      this.forget();
      this.clear();
      this.changed();
    }

    stop() {
      return this.act(`sessions/${this.id}/stop/`);
    }

    /** Another tab has begun a session, or a new one. */
    follow() {
      if (this.id === this.session?.id || this.making) return;
      this.drop();
      this.clear();
      this.connect();
      this.changed();
    }
  }

  // -- the element

  const CSS = `
:host{all:initial!important;display:contents!important}
:host([hidden]){display:none!important}
*{box-sizing:border-box;margin:0;padding:0}
section{--a:var(--parley-accent,light-dark(#0b5d63,#6ad0c7));--on:var(--parley-on-accent,light-dark(#fff,#04201f));--bg:var(--parley-surface,light-dark(#fffdf9,#15181b));--fg:var(--parley-text,light-dark(#1c1f22,#e9e6e0));--r:var(--parley-radius,14px);--b:light-dark(#a63d17,#f3a581);--mute:color-mix(in oklab,var(--fg) 70%,var(--bg));--tint:color-mix(in oklab,var(--fg) 5%,var(--bg));--edge:1px solid color-mix(in oklab,var(--fg) 16%,var(--bg));color-scheme:light dark;color:var(--fg);font:1em/1.55 var(--parley-font,system-ui,sans-serif)}
.light{color-scheme:light}.dark{color-scheme:dark}
.bubble{position:fixed;z-index:2147483647;inset-block-end:20px;inset-inline-end:20px}
.left{inset-inline:20px auto}
button{font:inherit;color:inherit;background:none;border:1px solid #0000;border-radius:calc(var(--r)*.6);cursor:pointer;min-width:28px;min-height:28px}
:focus-visible:not(textarea){outline:2px solid var(--a);outline-offset:2px}
svg{width:20px;height:20px;display:block;margin:auto;fill:none;stroke:currentColor;stroke-width:1.8;stroke-linecap:round;stroke-linejoin:round}
.launcher,.send{width:56px;height:56px;border-radius:50%;background:var(--a);color:var(--on)}
.launcher{box-shadow:0 6px 24px #0004}
.launcher svg{width:27px;height:27px}
.launcher i{position:absolute;inset:0 0 auto auto;border:8px solid var(--b);border-radius:50%}
.panel{display:flex;flex-direction:column;width:100%;height:var(--parley-height,34em);border:var(--edge);border-radius:var(--r);background:var(--bg);color:inherit;overflow:hidden;container-type:inline-size;position:relative}
dialog:not([open]){display:none}
dialog.panel{position:fixed;inset:auto;inset-block-end:88px;inset-inline-end:20px;width:min(var(--parley-width,25em),100vw - 40px);height:min(var(--parley-height,40em),100dvh - 108px);max-width:none;max-height:none;box-shadow:0 16px 60px #0003}
.left dialog.panel{inset-inline:20px auto}
.arena dialog.panel{width:min(var(--parley-width,58em),100vw - 40px)}
header{display:flex;align-items:center;gap:4px;padding:10px;padding-inline-start:16px;border-block-end:var(--edge)}
header div{flex:1;min-width:0}
h2,.empty h3{font:600 1.1em/1.3 var(--parley-font,ui-serif,Georgia,serif)}
.state,.code div{font-size:.8em;color:var(--mute)}
.state{animation:blink .3s .4s backwards}
.icon{color:var(--mute)}
.icon:hover,.on{color:var(--a);background:var(--tint)}
.log{flex:1;overflow:auto;overscroll-behavior:contain;padding:18px 16px 8px;display:flex;flex-direction:column;gap:14px;outline-offset:-3px}
.empty{margin:auto 0;display:grid;gap:8px}
.empty h3{font-size:1.5em}
p,.note,.by,.vote{color:var(--mute);font-size:.9em}
.plain{border:var(--edge);padding:4px 12px;font-size:.9em}
.empty button{padding:9px 13px;text-align:start}
.plain:hover{border-color:var(--a);background:var(--tint)}
.you{align-self:flex-end;max-width:85%;padding:8px 14px;border:1px solid #0000;border-radius:var(--r);border-end-end-radius:4px;background:color-mix(in oklab,var(--a) 16%,var(--bg));white-space:pre-wrap;overflow-wrap:anywhere}
.sending{color:var(--mute)}
.note{align-self:flex-end}
.bad{color:var(--b)}
.pair,.votes{display:grid;gap:12px}
.pair article{border:var(--edge);border-radius:var(--r);padding:12px 16px;min-width:0}
.pair .won{border-color:var(--a);outline:1px solid var(--a)}
.by{font-weight:600;margin-block-end:6px}
.by::before{content:"";display:inline-block;border:5px solid var(--a);border-radius:50%;margin-inline-end:8px}
.b .by::before{border-color:var(--b)}
.by em{float:inline-end;color:var(--a)}
.prose{overflow-wrap:anywhere}
.prose *{unicode-bidi:plaintext}
.prose p{color:inherit;font-size:1em}
.prose>*+*,li>*+*,blockquote>*+*{margin-block-start:.7em}
.prose :is(h3,h4){font-size:1.1em}
ul,ol{padding-inline-start:1.5em}
a{color:var(--a)}
blockquote{border-inline-start:3px solid var(--tint);padding-inline-start:12px}
hr{border:0;border-block-start:var(--edge)}
code{font:.88em/1.5 ui-monospace,Menlo,Consolas,monospace;background:var(--tint);border-radius:4px;padding:.1em .3em}
.code,.scroll{border:var(--edge);border-radius:calc(var(--r)*.6);overflow:auto}
.code div{display:flex;justify-content:space-between;align-items:center;padding-inline-start:12px;background:var(--tint)}
pre{overflow:auto;padding:10px 12px;direction:ltr;outline-offset:-3px}
pre code{background:none;padding:0}
table{border-collapse:collapse;width:100%;font-size:.92em;overflow-wrap:normal}
th,td{padding:6px 12px;text-align:start}
tr+tr td,tbody td{border-block-start:var(--edge)}
th{background:var(--tint)}
.end{text-align:end}.mid{text-align:center}
.dots i{display:inline-block;border:4px solid var(--mute);border-radius:50%;margin-inline-end:4px;animation:blink 1.2s infinite}
.dots i+i{animation-delay:.2s}.dots i+i+i{animation-delay:.4s}
.acts{display:flex;flex-wrap:wrap;align-items:center;gap:4px;margin-block-start:4px}
.acts svg{width:16px;height:16px}
.vote{text-align:center}
.votes{grid-template-columns:1fr 1fr;gap:8px;margin-block-start:8px}
.votes .plain{padding:8px;color:var(--fg)}
@container(min-width:560px){.pair{grid-template-columns:1fr 1fr}.votes{grid-template-columns:repeat(4,1fr)}}
.latest{position:absolute;inset:auto 0 76px;margin:auto;width:36px;height:36px;border:var(--edge);border-radius:50%;background:var(--bg)}
.alert{display:flex;gap:10px;align-items:center;justify-content:space-between;margin:0 12px;padding:8px 12px;font-size:.9em;border:1px solid var(--b);border-radius:var(--r)}
form{display:flex;gap:8px;align-items:end;margin:10px 12px 12px;padding:5px;padding-inline-start:14px;border:1px solid var(--mute);border-radius:22px}
form:focus-within{border-color:var(--a);outline:1px solid var(--a)}
textarea{flex:1;min-width:0;font:inherit;color:inherit;background:none;border:0;outline:0;resize:none;padding:5px 0;max-height:9em;field-sizing:content}
::placeholder{color:var(--mute);opacity:1}
.send{width:36px;height:36px}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@keyframes blink{from,to{opacity:.2}}
@media(max-width:480px){dialog.panel,.arena dialog.panel{inset:var(--top,0) 0 auto;width:100%;height:var(--high,100dvh);border:0;border-radius:0}.launched{visibility:hidden}}
@media(prefers-reduced-motion){*{animation:none!important}}
`;
  const sheet = new CSSStyleSheet(), screen = new CSSStyleSheet();
  sheet.replaceSync(CSS);
  // A phone's keyboard covers the page without making it smaller; only the visual viewport knows.
  const fit = () => screen.replaceSync(`section{--high:${visualViewport.height}px;--top:${visualViewport.offsetTop}px}`);

  class Chat extends HTMLElement {
    option(name) {
      return this.getAttribute(name) ?? this.dataset[name] ?? script.dataset[name];
    }

    connectedCallback() {
      if (this.root) return; // it was moved
      this.root = this.attachShadow({mode: 'open'});
      this.root.adoptedStyleSheets = [sheet, screen];
      const mode = this.option('mode') || 'direct', [model_a_id, model_b_id] = this.option('model')?.split(',') || [];
      this.arena = mode !== 'direct';
      this.inline = this.option('inline') != null;
      this.words = {...WORDS, ...JSON.parse(this.option('strings') || '{}')};
      this.follows = true;
      this.settings = {};
      const talk = this.talk = new Talk(this.option('host') || new URL(script.src).origin, {mode: mode === 'arena' ? 'random' : mode, model_a_id, model_b_id},
        this.option('shared'), this.option('remember') || 'local');
      talk.changed = () => (this.frame ||= requestAnimationFrame(() => this.draw()));
      talk.tell = (what, detail) => this.hear(what, detail);
      this.draw();
      if (this.inline) this.begin();
      else if (this.option('open') != null) this.toggle(true);
    }

    /** The first open: before it nothing is asked, read or kept. */
    begin() {
      if (this.begun) return;
      this.begun = true;
      const {talk} = this;
      talk.start();
      talk.api('widget/', null, 'GET').then((settings) => {
        this.settings = settings;
        talk.changed();
      }, () => 0);
      addEventListener('online', () => talk.check());
      addEventListener('offline', () => talk.drop(1006));
      addEventListener('storage', ({key}) => key === talk.name && talk.follow());
      document.addEventListener('visibilitychange', () => document.hidden || talk.check());
      visualViewport.onresize = visualViewport.onscroll = fit;
      fit();
    }

    emit(name, detail) {
      return this.dispatchEvent(new CustomEvent(`chat:${name}`, {detail, bubbles: true, composed: true, cancelable: name === 'send'}));
    }

    hear(what, detail) {
      if (what !== 'turn') return this.emit(what, detail);
      const texts = this.talk.list.filter(({turn, role}) => turn === detail && role !== 'user').map(({text}) => text);
      this.said = `${this.words.done}. ${texts.length > 1 ? '' : texts}`;
      this.unread = !this.inline && !this.opened;
    }

    $(selector) {
      return this.root.querySelector(selector);
    }

    toggle(open = !this.opened) {
      if (this.inline || open === !!this.opened) return;
      const panel = this.$('dialog');
      if (!open) return panel.close();
      this.opened = true;
      this.unread = false;
      this.begin();
      this.draw();
      panel[matchMedia('(max-width:480px)').matches ? 'showModal' : 'show']();
      this.$('textarea').focus();
      this.emit('open');
    }

    send(text) {
      if (!text.trim() || this.talk.running || !this.emit('send', {text})) return false;
      this.follows = true;
      this.talk.say(text.trim());
      return true;
    }

    stop() {
      return this.talk.stop();
    }

    reset() {
      this.talk.reset();
    }

    async vote(message, preference, kind) {
      const {talk} = this, cast = await talk.act('feedback/', {session_id: talk.id, message_id: message.id, feedback_type: kind || 'preference', preference});
      if (!cast) return;
      talk.session = cast.session_update;
      talk.put({...message, feedback: preference}, message.text);
      talk.changed();
      this.said = this.words.voted;
      this.emit('vote', {message_id: message.id, preference, session: talk.session});
    }

    copy(text, button) {
      navigator.clipboard?.writeText(text).then(() => {
        this.said = button.title = this.words.copied;
        button.className += ' on';
        this.talk.changed();
      });
    }

    // How it looks

    draw() {
      this.frame = 0;
      const {words, talk, inline, opened} = this, {messages, state, problem} = talk;
      const title = this.option('title') || this.settings.title || words.title;
      const kids = [
        h('header', {part: 'header'},
          h('div', null, h('h2', null, title), /new|live|over/.test(state) || h('div', {class: 'state', role: 'status'}, words[state])),
          messages.size > 0 && !talk.shared && this.button('reset', () => this.reset()), inline || this.button('close', () => this.toggle())),
        this.log(),
        this.follows || this.button('latest', () => this.down(true), 'latest'),
        problem && h('div', {class: 'alert', role: 'alert'}, this.sentence(problem), state === 'over' ? talk.shared ? '' : this.button('reset', () => this.reset(), 'plain', words.reset)
          : this.button('close', () => talk.changed(talk.problem = null))),
        talk.shared ? '' : this.composer(),
        h('div', {class: 'sr', role: 'status'}, this.said),
      ];
      show(this.root, [h('section', {'aria-label': title, lang: this.option('lang'), dir: this.option('dir'),
        class: [inline ? '' : 'bubble', this.arena ? 'arena' : '', this.option('side'), this.option('theme')].join(' ')},
      inline ? h('div', {class: 'panel', part: 'panel'}, kids) : [
        h('button', {class: `launcher ${opened ? 'launched' : ''}`, part: 'launcher', 'aria-expanded': !!opened, onclick: () => this.toggle(),
          'aria-label': opened ? words.close : words.open, title: this.unread ? words.unread : null}, icon(opened ? 'close' : 'open'), this.unread && h('i')),
        h('dialog', {class: 'panel', part: 'panel', 'aria-label': title, onkeydown: ({key, isComposing}) => key === 'Escape' && !isComposing && this.toggle(false), onclose: () => {
          this.opened = false;
          this.draw();
          this.$('.launcher').focus();
        }}, kids),
      ])]);
      if (this.follows) this.down();
    }

    down(follows) {
      const log = this.$('.log');
      if (follows) this.follows = true;
      log.scrollTop = log.scrollHeight;
    }

    button(name, onclick, look = 'icon', text, more) {
      return h('button', {type: 'button', class: look, title: this.words[name], 'aria-label': this.words[name], onclick, ...more}, text || icon(name));
    }

    plain(name, onclick) {
      return this.button(name, onclick, 'plain', this.words[name]);
    }

    log() {
      const {talk, words, arena, settings} = this, {list} = talk, turns = [];
      for (const each of list) each.role === 'user' || !turns.length ? turns.push([each]) : turns.at(-1).push(each);
      return h('div', {class: 'log', part: 'log', role: 'log', 'aria-live': 'off', 'aria-label': words.log, tabindex: 0, onscroll: ({target}) => {
        const follows = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
        if (follows !== this.follows) talk.changed(this.follows = follows);
      }}, list.length ? [list[0].position > 0 && list[0].position < 1e9 && this.plain('earlier', () => talk.earlier()), turns.map((turn, i) => this.turn(turn, !turns[i + 1]))]
        : talk.shared ? '' : h('div', {class: 'empty'}, h('h3', null, this.option('greeting') || (arena ? words.battle : settings.greeting || words.hello)),
          h('p', null, arena ? words.blind : words.intro), (this.option('suggestions')?.split('|') || settings.suggestions || []).map((text) => this.button(null, () => this.send(text), 'plain', text))));
    }

    turn([user, ...replies], last) {
      const {words, talk} = this, {id, text, status, problem, feedback} = user, pair = replies.length > 1;
      return [
        h('div', {key: id, class: `you ${status}`, part: 'message', dir: 'auto'}, h('span', {class: 'sr'}, `${words.you}: `), text),
        status === 'sending' && /offline|connecting/.test(talk.state) && h('div', {class: 'note'}, words.queued),
        problem && h('div', {class: 'note bad', role: 'alert'}, this.sentence(problem), ' ', this.plain('again', () => talk.say(text, id))),
        replies.length > 0 && h('div', {key: `${id} replies`, class: pair ? 'pair' : ''}, replies.sort((a, b) => (a.participant < b.participant ? -1 : 1)).map((reply) => this.reply(reply, user, pair, last))),
        pair && !talk.shared && replies.every((reply) => reply.status === 'success') && h('div', {class: 'vote', role: 'group', 'aria-label': words.which}, feedback ? words.voted : [words.which,
          h('div', {class: 'votes'}, ['model_a', 'model_b', 'tie', 'both_bad'].map((each) => this.plain(each, () => this.vote(user, each))))]),
      ];
    }

    reply(reply, user, pair, last) {
      const {words, talk} = this, {id, status, participant, text, feedback} = reply, running = isRunning(reply), mine = !talk.shared, good = status === 'success';
      const won = pair && user.feedback === `model_${participant}`, name = talk.session?.[`model_${participant}`]?.display_name || reply.model?.display_name || words.model;
      const again = () => talk.act(`messages/${id}/regenerate/`);
      return h('article', {key: id, class: `${participant} ${won ? 'won' : ''}`, part: 'message', 'aria-label': name, 'aria-busy': running},
        pair && h('div', {class: 'by'}, name, won && h('em', null, `✓ ${words.pick}`)),
        running && !text && h('div', {class: 'dots', role: 'img', 'aria-label': words.thinking}, h('i'), h('i'), h('i')),
        h('div', {class: 'prose', dir: 'auto', onshow: (node) => (node.write ||= prose(node, this))(text, running)}),
        running || h('div', {class: 'acts'},
          good || h('span', {class: 'note bad'}, words[status]),
          status === 'interrupted' && mine && last && !pair && this.plain('go_on', () => this.send(words.go_on)),
          text && this.button('copy', ({currentTarget}) => this.copy(text, currentTarget)),
          mine && last && !user.feedback && (good ? !pair && this.button('again', again) : this.plain('again', again)),
          mine && good && !pair && ['like', 'dislike'].map((each) => this.button(each, () => this.vote(reply, each, 'rating'), `icon ${feedback === each ? 'on' : ''}`, null, {'aria-pressed': feedback === each}))));
    }

    sentence({code, message, retry_after: wait}) {
      const {words} = this;
      return `${words[code] || message || words.over} ${wait ? words.wait.replace('{}', Math.ceil(wait)) : ''}`;
    }

    composer() {
      const {words, talk} = this, submit = (event) => {
        event.preventDefault();
        const box = this.$('textarea');
        if (this.send(box.value)) box.value = '';
      };
      return h('form', {part: 'composer', onsubmit: submit},
        h('textarea', {rows: 1, dir: 'auto', maxlength: 16000, enterkeyhint: 'send', placeholder: words.write, 'aria-label': words.write,
          onkeydown: (event) => event.key === 'Enter' && !event.shiftKey && !event.isComposing && submit(event)}),
        talk.running ? this.button('stop', () => this.stop(), 'send') : this.button('send', null, 'send', null, {type: 'submit'}));
    }

    code(language, text) {
      return h('div', {class: 'code'}, h('div', null, language || this.words.code, this.button('copy', ({currentTarget}) => this.copy(text, currentTarget))),
        h('pre', {tabindex: 0, role: 'group', 'aria-label': this.words.code}, h('code', null, text)));
    }

    /** An image is a request that the answer's author could read things out of: only hosts that were named are asked. */
    image(url, alt) {
      const host = /^https:\/\/([^/?#@\\]+)([/?#]|$)/i.exec(url)?.[1], allowed = this.option('images')?.split(' ') || [];
      return host && (allowed.includes(host) || allowed.includes('*')) ? h('img', {src: url, alt, loading: 'lazy', referrerpolicy: 'no-referrer'}) : link(url, `${this.words.image}: ${alt || host}`);
    }
  }

  customElements.define('parley-chat', Chat);
  const begin = () => document.querySelector('parley-chat') || document.body.append(document.createElement('parley-chat'));
  if (document.readyState === 'loading') addEventListener('DOMContentLoaded', begin);
  else begin();
})();
