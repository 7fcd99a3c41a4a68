// The pages beside the widget: this host in the lines to copy, and which session is shared.
const host = (text) => text.replace(/(https|wss):\/\/HOST/, (_, kind) => (kind === 'wss' ? location.origin.replace('http', 'ws') : location.origin));
for (const code of document.querySelectorAll('[data-host]')) {
  code.textContent = host(code.textContent);
  const button = document.createElement('button');
  button.textContent = 'Copy';
  button.onclick = async () => {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = 'Copied';
  };
  if (navigator.clipboard) code.parentNode.before(button);
}
const shared = document.querySelector('[data-shared]');
if (shared) shared.dataset.shared = location.pathname.split('/')[2];
