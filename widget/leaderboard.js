// The leaderboard page: a table, a picture of ratings with their intervals, the win rates, and what was left out.
const WHY = {
  revealed: 'The names had been revealed by an earlier vote in the same session.',
  named: 'An answer said which model it was.',
};
const $ = (id) => document.getElementById(id);
const number = (value, digits = 0) => (value == null ? '–' : value.toFixed(digits));

const make = (tag, attributes = {}, ...kids) => {
  const node = /^(svg|line|circle|text|g|title)$/.test(tag) ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...kids);
  return node;
};

const row = (each) => make('tr', {},
  make('td', {}, String(each.rank ?? '–')),
  make('th', {scope: 'row'}, each.name, make('small', {}, each.provider)),
  make('td', {class: 'n'}, number(each.elo_rating)),
  make('td', {class: 'n'}, each.ci_lower == null ? '–' : `${number(each.ci_lower)} … ${number(each.ci_upper)}`),
  make('td', {class: 'n'}, (each.rating_change > 0 ? '+' : '') + number(each.rating_change, 1)),
  make('td', {class: 'n'}, String(each.battles), ...each.preliminary ? [make('small', {}, 'preliminary')] : []),
  make('td', {class: 'n'}, `${number(each.win_rate * 100)} %`));

function picture(board) {
  const rated = board.filter((each) => each.elo_rating != null && each.ci_lower != null);
  if (!rated.length) return make('p', {}, 'No model has an interval yet.');
  const least = Math.min(...rated.map((each) => each.ci_lower)), most = Math.max(...rated.map((each) => each.ci_upper));
  const step = [10, 20, 50, 100, 200, 500, 1000, 5000].find((size) => (most - least) / size <= 8) || 10000;
  const from = Math.floor(least / step) * step, to = Math.ceil(most / step) * step || from + step;
  const left = 170, width = 720, line = 34, height = rated.length * line + 34;
  const x = (rating) => left + ((rating - from) / (to - from)) * (width - left - 20);
  const kids = [make('title', {}, 'Ratings with 95 % intervals; the table above has the numbers.')];
  for (let tick = from; tick <= to; tick += step) {
    kids.push(make('line', {class: 'grid', x1: x(tick), x2: x(tick), y1: 0, y2: height - 28}), make('text', {x: x(tick), y: height - 8, 'text-anchor': 'middle'}, String(tick)));
  }
  rated.forEach((each, i) => {
    const y = i * line + line / 2;
    kids.push(make('g', each.preliminary ? {class: 'preliminary'} : {}, make('text', {class: 'label', x: left - 14, y: y + 5, 'text-anchor': 'end'}, each.name.slice(0, 22)),
      make('line', {class: 'range', x1: x(each.ci_lower), x2: x(each.ci_upper), y1: y, y2: y}), make('circle', {cx: x(each.elo_rating), cy: y, r: 6})));
  });
  return make('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': 'Ratings with 95 % intervals; the table above has the numbers.'}, ...kids);
}

function matrix(board, pairs) {
  const met = {}; // "row column" → [won, battles]
  const add = (one, other, won, votes) => {
    const cell = (met[`${one} ${other}`] ||= [0, 0]);
    cell[0] += won * votes;
    cell[1] += votes;
  };
  for (const {model_a, model_b, preference, votes} of pairs) {
    const won = {model_a: 1, model_b: 0}[preference] ?? 0.5;
    add(model_a, model_b, won, votes);
    add(model_b, model_a, 1 - won, votes);
  }
  const cell = (one, other) => {
    const found = met[`${one.id} ${other.id}`];
    if (one === other || !found) return make('td', {class: 'none'}, one === other ? '' : '–');
    const rate = found[0] / found[1];
    return make('td', {class: `w${Math.round(rate * 10)}`, title: `${one.name} against ${other.name}: ${found[1]} battles`}, `${Math.round(rate * 100)} %`, make('small', {}, String(found[1])));
  };
  return [make('thead', {}, make('tr', {}, make('td', {}), ...board.map((each) => make('th', {scope: 'col'}, each.name)))),
    make('tbody', {}, ...board.map((one) => make('tr', {}, make('th', {scope: 'row'}, one.name), ...board.map((other) => cell(one, other)))))];
}

const get = async (path) => {
  const answer = await fetch(`/api/leaderboard/${path}?period=${$('period').value}&mode=${$('mode').value}`);
  if (!answer.ok) throw new Error((await answer.json()).message);
  return answer.json();
};

async function load() {
  try {
    const [board, details] = await Promise.all([get(''), get('details/')]);
    $('board').hidden = !board.length;
    $('state').textContent = board.length ? `${details.counted} votes counted.` : 'No vote has been counted yet. The first could be yours: start a battle in the arena.';
    $('rows').replaceChildren(...board.map(row));
    $('chart').replaceChildren(picture(board));
    $('matrix').replaceChildren(...matrix(board, details.pairs));
    $('left').replaceChildren(...details.left_out.length
      ? details.left_out.map(({reason, votes}) => make('li', {}, make('b', {}, `${votes}`), ` ${WHY[reason] || reason}`)) : [make('li', {}, 'Nothing: every vote counts.')]);
  } catch (problem) {
    $('state').textContent = `The leaderboard cannot be read just now. ${problem.message}`;
  }
}

$('period').onchange = $('mode').onchange = load;
load();
