// The operator's page: the latest sessions, one of them live in the widget, taken over and handed back. The token is kept in memory.
const $ = (id) => document.getElementById(id);
const chat = document.querySelector('parley-chat');
let token = '', name = '', open = null;

async function ask(path = '', change) {
  const init = change && {method: 'PATCH', body: JSON.stringify(change)};
  const answer = await fetch(`/api/admin/sessions/${path}`, {headers: {Authorization: `Bearer ${token}`}, ...init});
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.message);
  return said;
}

/** Run `work`; a refusal is said on the page. */
const said = (work) => async (event) => {
  event?.preventDefault();
  $('state').textContent = '';
  try {
    await work(event);
  } catch (problem) {
    $('state').textContent = problem.message;
  }
};

function line(session) {
  const button = document.createElement('button');
  const {title, display_name: visitor, message_count: count, updated_at: at, operator} = session;
  button.textContent = title || 'No message yet';
  const small = document.createElement('small');
  small.textContent = [visitor, `${count} messages`, new Date(at).toLocaleString(), operator && `answered by ${operator}`].filter(Boolean).join(' · ');
  button.append(small);
  if (session.id === open?.id) button.setAttribute('aria-current', 'true');
  button.dataset.id = session.id;
  button.onclick = said(() => show(session.id));
  const item = document.createElement('li');
  item.append(button);
  return item;
}

let shown = '';
async function list() {
  const sessions = await ask(), now = JSON.stringify([sessions, open?.id]);
  if (now === shown) return;
  shown = now;
  const focused = document.activeElement.dataset.id; // the buttons are made anew
  $('sessions').replaceChildren(...sessions.map(line));
  if (focused) document.querySelector(`[data-id="${focused}"]`)?.focus();
  if (!sessions.length) $('state').textContent = 'No visitor has written yet.';
}

async function show(id) {
  open = await ask(id);
  chat.clear();
  chat.keep({guest: open.token, direct: open.id});
  chat.connect();
  stand();
  await list();
}

/** How the open session stands: who answers in it. */
function stand() {
  $('over').hidden = chat.hidden = false;
  $('take').textContent = open.operator ? 'Hand back to the model' : 'Take over';
  $('who').textContent = open.operator ? `${open.operator} answers; the model is silent.` : 'The model answers.';
}

chat.addEventListener('chat:send', (event) => chat.id || event.preventDefault()); // here nobody begins a session

$('enter').onsubmit = said(async () => {
  [token, name] = [$('token').value, $('name').value];
  await list();
  $('enter').hidden = true;
  $('sessions').querySelector('button')?.focus();
  setInterval(() => list().catch(() => {}), 5000); // the next one may find the service again
});

$('take').onclick = said(async () => {
  const {operator} = await ask(open.id, {operator: open.operator ? null : name});
  open.operator = operator;
  stand();
  await list();
});
