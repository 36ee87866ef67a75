/* The live part of the pages. Every form works without it.
 *
 * - The seats are the form's own check boxes; a poll (a 304 nearly always) changes only those whose
 *   status has changed.
 * - A pick that somebody else was quicker with is told and dropped; the other picks stay.
 * - While the server is away, polls slow down; a hold is sent again with its key, so it is one hold.
 */
const POLL_MS = 1000;
const POLL_AWAY_MAX_MS = 5000;
const SEND_ATTEMPTS = 8;
const ANSWER_TIMEOUT_MS = 10000;

const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));
const fill = (text, values) => text.replace(/%\((\w+)\)s/g, (_, name) => values[name]);
const ask = (url, options) =>
  fetch(url, { cache: "no-store", signal: AbortSignal.timeout(ANSWER_TIMEOUT_MS), ...options });

/** Count down to a deadline that the server gave in seconds; then show what the server says. */
function countDown(element) {
  const text = element.querySelector("b");
  const soon = document.querySelector("[data-soon]");
  const end = performance.now() + Number(element.dataset.countdown) * 1000;
  if (end - performance.now() > 86400000) return;
  element.hidden = false;
  const tick = async () => {
    const left = Math.max(0, Math.ceil((end - performance.now()) / 1000));
    const [hours, minutes, seconds] = [left / 3600, (left / 60) % 60, left % 60].map(Math.floor);
    text.textContent = [...(hours ? [hours, String(minutes).padStart(2, "0")] : [minutes]), String(seconds).padStart(2, "0")].join(":");
    if (soon && left <= 60 && left > 0 && !soon.textContent) soon.textContent = soon.dataset.soon;
    if (left > 0) return setTimeout(tick, 250);
    // A reload while the server is away would lose the page.
    for (let wait = 200; ; wait = Math.min(wait * 2, POLL_AWAY_MAX_MS)) {
      await pause(wait + Math.random() * wait);
      try {
        if ((await ask(location.href)).ok) return location.reload();
      } catch { /* it is still away: ask again */ }
    }
  };
  tick();
}

class Hall {
  constructor(form) {
    this.form = form;
    this.words = JSON.parse(form.dataset.words);
    this.prices = JSON.parse(form.dataset.prices);
    this.mine = new Set(JSON.parse(form.dataset.mine));
    this.most = Number(form.dataset.most);
    this.open = form.dataset.state === "open";
    this.tag = `W/"${form.dataset.tag}"`;
    this.url = `/api/performances/${form.dataset.performance}`;
    this.seats = new Map();
    for (const input of form.querySelectorAll(".row input")) {
      this.seats.set(Number(input.value), { input, status: this.drawn(input) });
    }
    // As the server writes them: browsers leave out the decimals of some currencies that have them.
    this.decimals = Number(form.dataset.decimals);
    this.money = new Intl.NumberFormat(document.documentElement.lang === "ko" ? "ko-KR" : "en-GB",
      { style: "currency", currency: form.dataset.currency, minimumFractionDigits: this.decimals, maximumFractionDigits: this.decimals });
    this.kept = `picks ${form.dataset.performance}`;
    this.live = document.getElementById("live");
    this.told = document.getElementById("told");
    this.busy = false;
  }

  drawn(input) {
    const { classList } = input.parentElement;
    return classList.contains("t") ? "reserved" : classList.contains("h") ? "held" : classList.contains("m") ? "mine" : "available";
  }

  start() {
    for (const hint of this.form.querySelectorAll(".script, .zoom")) hint.hidden = false;
    for (const hint of this.form.querySelectorAll(".noscript")) hint.hidden = true;
    this.form.addEventListener("click", (event) => this.clicked(event));
    if (this.open) {
      this.restore();
      this.rove();
      this.form.addEventListener("change", (event) => this.changed(event.target));
      this.form.addEventListener("keydown", (event) => this.move(event));
      for (const form of [this.form, document.getElementById("best")]) form.addEventListener("submit", (event) => this.submit(event));
      this.show();
    }
    this.poll();
  }

  /* ---- what is chosen */

  picks() {
    return [...this.seats].filter(([, seat]) => seat.input.checked).map(([id]) => id);
  }

  name(id) {
    const { input } = this.seats.get(id);
    return fill(this.words.seat, {
      section: input.closest("details").dataset.section,
      row: input.closest(".row").dataset.row,
      number: input.nextElementSibling.textContent,
    });
  }

  restore() {
    const kept = JSON.parse(sessionStorage.getItem(this.kept) ?? "[]");
    for (const id of kept) {
      const seat = this.seats.get(id);
      if (seat && !seat.input.disabled) seat.input.checked = true;
    }
  }

  changed(input) {
    if (input.name !== "seat_ids") return;
    if (input.checked && this.picks().length > this.most) {
      input.checked = false;
      this.tell(fill(this.words.most, { most: this.most }));
    } else {
      this.tell("");
    }
    input.parentElement.classList.remove("lost");
    this.rove(input);
    this.show();
  }

  show() {
    const picks = this.picks();
    sessionStorage.setItem(this.kept, JSON.stringify(picks));
    const list = document.getElementById("picks");
    list.replaceChildren(...picks.map((id) => {
      const item = document.createElement("li");
      const remove = document.createElement("button");
      remove.type = "button";
      remove.dataset.remove = id;
      remove.textContent = `${this.name(id)} · ${this.money.format(this.major(id))}`;
      remove.setAttribute("aria-label", fill(this.words.remove, { seat: remove.textContent }));
      item.append(remove);
      return item;
    }));
    if (!picks.length) {
      const none = document.createElement("li");
      none.textContent = this.words.none;
      none.className = "soft";
      list.replaceChildren(none);
    }
    const sum = document.getElementById("sum");
    const total = picks.reduce((amount, id) => amount + this.major(id), 0);
    sum.hidden = !picks.length;
    sum.textContent = `${this.words.total} ${this.money.format(total)}`;
  }

  /** The price in whole units; a seat's class has its price's place in the legend. */
  major(id) {
    const label = this.seats.get(id).input.parentElement;
    return this.prices[label.dataset.price ?? label.className[1]] / 10 ** this.decimals;
  }

  /* ---- keyboard: one stop for the whole map, arrows within it */

  rove(to) {
    const inputs = [...this.seats.values()].map((seat) => seat.input);
    const stop = to ?? inputs.find((input) => input.checked && !input.disabled) ?? inputs.find((input) => !input.disabled);
    if (this.stop) this.stop.tabIndex = -1;
    else for (const input of inputs) input.tabIndex = -1;
    if (stop) stop.tabIndex = 0;
    this.stop = stop;
  }

  move(event) {
    const from = event.target;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step || from.name !== "seat_ids" || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const to = step[0] ? this.across(from, step[0]) : this.along(from, step[1]);
    if (!to) return;
    this.rove(to);
    to.focus();
    to.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  along(from, step) {
    let label = from.parentElement;
    do label = step > 0 ? label.nextElementSibling : label.previousElementSibling;
    while (label && label.querySelector("input")?.disabled !== false);
    return label?.querySelector("input");
  }

  across(from, step) {
    const rows = [...this.form.querySelectorAll("details[open] .row")];
    const x = from.getBoundingClientRect().x;
    const off = (input) => Math.abs(input.getBoundingClientRect().x - x);
    for (let at = rows.indexOf(from.closest(".row")) + step; rows[at]; at += step) {
      const free = [...rows[at].querySelectorAll("input:enabled")];
      if (free.length) return free.reduce((best, input) => (off(input) < off(best) ? input : best));
    }
    return null;
  }

  clicked(event) {
    const { remove, zoom } = event.target.closest("button")?.dataset ?? {};
    if (remove) {
      const { input } = this.seats.get(Number(remove));
      input.checked = false;
      this.changed(input);
      (document.querySelector("#picks button") ?? input).focus();
    }
    if (zoom) {
      this.size = Math.min(3.2, Math.max(1, (this.size ?? 2) + Number(zoom) * 0.3));
      document.getElementById("map").style.setProperty("--seat", `${this.size}rem`);
    }
  }

  /* ---- what the others do */

  async poll() {
    let wait = POLL_MS;
    for (;;) {
      await pause(wait);
      if (document.hidden) {
        await new Promise((resume) => document.addEventListener("visibilitychange", resume, { once: true }));
        continue;
      }
      try {
        const answer = await ask(`${this.url}/seats`, { headers: { "If-None-Match": this.tag } });
        if (answer.status === 200) {
          this.update((await answer.json()).seats);
          this.tag = answer.headers.get("ETag");
        } else if (answer.status !== 304) {
          throw new Error(`answered ${answer.status}`);
        }
        wait = POLL_MS;
        this.connected(true);
      } catch {
        wait = Math.min(wait * 1.5, POLL_AWAY_MAX_MS);
        this.connected(false);
      }
    }
  }

  connected(yes) {
    const text = yes ? this.words.live : this.words.offline;
    this.live.classList.toggle("off", !yes);
    // Only what changes is set: it is read out.
    if (this.live.textContent !== text) this.live.textContent = text;
  }

  update(seats) {
    const lost = [];
    const free = new Map();
    for (const { seat_id: id, section, status } of seats) {
      const count = free.get(section) ?? [0, 0];
      free.set(section, [count[0] + (status === "available"), count[1] + 1]);
      if (this.mark(id, status === "blocked" ? "reserved" : status)) lost.push(id);
    }
    for (const details of this.form.querySelectorAll("details")) this.count(details.querySelector(".count"), free.get(details.dataset.section));
    this.count(document.getElementById("free"), [...free.values()].reduce((sum, each) => [sum[0] + each[0], sum[1] + each[1]], [0, 0]));
    this.dropped(lost);
  }

  count(element, numbers) {
    if (numbers) element.textContent = fill(this.words.free, { free: numbers[0], seats: numbers[1] });
  }

  /** Draw a seat's status; returns whether it was a pick and no longer is. */
  mark(id, status) {
    const seat = this.seats.get(id);
    const drawn = status !== "available" && this.mine.has(id) ? "mine" : status;
    if (!seat || seat.status === drawn) return false;
    seat.status = drawn;
    const { input } = seat;
    const { classList } = input.parentElement;
    const lost = input.checked && drawn !== "available";
    classList.toggle("t", drawn === "reserved");
    classList.toggle("h", drawn === "held");
    classList.toggle("m", drawn === "mine");
    classList.toggle("lost", lost);
    const focused = document.activeElement === input;
    input.disabled = drawn !== "available" || !this.open;
    if (input.disabled) {
      input.checked = false;
      const word = { held: this.words.held, mine: this.words.yours }[drawn] ?? this.words.taken;
      input.setAttribute("aria-label", `${input.nextElementSibling.textContent}, ${word}`);
      if (this.stop === input) this.rove(this.along(input, 1) ?? this.along(input, -1));
      if (focused) this.stop?.focus();
    } else {
      input.removeAttribute("aria-label");
      if (!this.stop) this.rove(input);
    }
    return lost;
  }

  dropped(ids) {
    if (!ids.length) return;
    this.show();
    const words = this.picks().length ? this.words.lost : this.words.lostAll;
    this.tell(fill(words, { seats: ids.map((id) => this.name(id)).join("; ") }));
  }

  /* ---- hold */

  tell(text) {
    const said = document.createElement("p");
    said.className = "message";
    said.textContent = text;
    this.told.replaceChildren(...(text ? [said] : []));
    if (text) this.told.scrollIntoView({ block: "nearest" });
  }

  async submit(event) {
    event.preventDefault();
    if (this.busy) return;
    const button = event.submitter ?? document.getElementById("hold");
    const best = button.value === "best";
    const count = Number(document.getElementById("count").value);
    const picks = this.picks();
    if (best ? !(count >= 1 && count <= this.most) : !picks.length) {
      return this.tell(best ? fill(this.words.most, { most: this.most }) : this.words.none);
    }
    this.busy = true;
    button.setAttribute("aria-disabled", "true");
    this.tell(this.words.waiting);
    const body = best ? { count } : { performance_id: Number(this.form.dataset.performance), seat_ids: picks };
    try {
      await this.answered(best, await this.send(best ? `${this.url}/best-available` : "/api/reservations", body));
    } finally {
      this.busy = false;
      button.removeAttribute("aria-disabled");
    }
  }

  /** Send until it is answered: with its key it counts once, however often it arrives. */
  async send(url, body) {
    const headers = { "Content-Type": "application/json", "Idempotency-Key": crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` };
    for (let attempt = 1; ; attempt += 1) {
      try {
        const answer = await ask(url, { method: "POST", headers, body: JSON.stringify(body) });
        const again = answer.status === 503 || (answer.status === 409 && answer.headers.has("Retry-After"));
        if (!again || attempt === SEND_ATTEMPTS) return answer;
        await pause(1000 * Math.min(5, Number(answer.headers.get("Retry-After")) || 1));
      } catch {
        if (attempt === SEND_ATTEMPTS) return null;
        this.connected(false);
        await pause(Math.min(300 * 2 ** attempt, POLL_AWAY_MAX_MS));
      }
    }
  }

  async answered(best, answer) {
    if (answer?.status === 201) {
      const { reservation_id: id } = await answer.json();
      sessionStorage.removeItem(this.kept);
      return location.assign(`/reservations/${id}`);
    }
    const problem = answer?.headers.get("Content-Type")?.includes("problem+json") ? await answer.json() : { type: "unavailable" };
    const lost = (problem.unavailable_seats ?? []).filter((id) => this.seats.has(id));
    if (!lost.length) {
      const words = best && problem.type === "seats-unavailable" ? this.words.noSeats : this.words.problems[problem.type];
      return this.tell(words ?? this.words.problems["internal-error"]);
    }
    // How they are taken, the next poll tells: it must not find its tag unchanged.
    this.tag = "";
    for (const id of lost) this.mark(id, "reserved");
    this.dropped(lost);
  }
}

document.querySelectorAll("[data-countdown]").forEach(countDown);
const form = document.getElementById("hall");
if (form) new Hall(form).start();
