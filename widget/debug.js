// A session's events as they come, and the one thing a client keeps: the last cursor.
const $ = (id) => document.getElementById(id);
$('say').previousElementSibling.firstChild.textContent = $('say').previousElementSibling.textContent.replace('wss://HOST', location.origin.replace('http', 'ws'));
let socket, cursor = '', started = performance.now();

const cell = (text, name = '') => Object.assign(document.createElement('td'), {textContent: text, className: name});

function add(type, known, rest) {
  const line = document.createElement('tr');
  line.className = type;
  const json = cell('', 'json');
  json.append(Object.assign(document.createElement('div'), {textContent: rest, title: rest}));
  line.append(cell(Math.round(performance.now() - started), 'n'), cell(type), cell(known ?? '', 'cursor'), json);
  const box = $('events').closest('.scroll'), follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  $('events').append(line);
  if (follows) box.scrollTop = box.scrollHeight;
}

function open(then) {
  const query = cursor && `?cursor=${encodeURIComponent(cursor)}`;
  const mine = socket = new WebSocket(`${location.origin.replace('http', 'ws')}/ws/chat/session/${$('session').value}/${query}`);
  mine.onopen = () => {
    add('open', '', query);
    then?.();
  };
  mine.onmessage = ({data}) => {
    const {type, requestId, turn_id, cursor: now, ...rest} = JSON.parse(data);
    cursor = now ?? (type === 'session_state' ? rest.turn?.cursor : undefined) ?? cursor;
    add(type, now, JSON.stringify(rest));
    $('state').textContent = cursor ? `The last cursor is ${cursor}` : '';
  };
  mine.onclose = ({code, reason}) => {
    add('close', '', `${code} ${reason}`);
    if (mine === socket) socket = null;
  };
}

$('say').onsubmit = (event) => {
  event.preventDefault();
  const say = () => socket.send(JSON.stringify({type: 'message', content: $('text').value}));
  if (socket?.readyState === 1) say();
  else open(say);
};
// The socket is cut and opened again at once: what was missed comes first, and nothing twice.
$('cut').onclick = () => {
  socket?.close();
  socket = null;
  open();
};
$('clear').onclick = () => {
  $('events').replaceChildren();
  started = performance.now();
};
$('session').onchange = () => {
  socket?.close();
  socket = null;
  cursor = '';
};
