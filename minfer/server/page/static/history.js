// What the page has seen of the engine: steps, requests, seats. The server keeps little; this keeps what is drawn.

const MAX_STEPS = 600;
const MAX_ENDED = 300;
const MAX_SEEN = 2000;
export const LANES = 16;

export const DECODE = 0;
export const PREFILL = 1;
export const RECOMPUTE = 2;

export class History {
  constructor() {
    this.steps = [];
    this.ended = [];
    this.requests = new Map(); // id -> what the server said of it last
    this.lanes = Array(LANES).fill(null); // who sits where: a request keeps its lane while it runs
  }

  get lastStep() {
    return this.steps.length ? this.steps.at(-1).step : 0;
  }

  take(state) {
    if (state.counters.steps < this.lastStep) Object.assign(this, new History()); // another server
    for (const request of [...state.running, ...state.waiting]) this.requests.set(request.id, request);
    for (const step of state.steps) if (step.step > this.lastStep) this.takeStep(step);
    const last = this.ended.at(-1);
    const known = new Set(this.ended.map((end) => end.id));
    this.ended.push(...state.ended.filter((end) => !known.has(end.id) && (!last || end.at >= last.at)));
    this.steps.splice(0, this.steps.length - MAX_STEPS);
    this.ended.splice(0, this.ended.length - MAX_ENDED);
    while (this.requests.size > MAX_SEEN) this.requests.delete(this.requests.keys().next().value);
  }

  takeStep(step) {
    step.total = step.us.reduce((sum, part) => sum + part, 0);
    step.lanes = new Map();
    step.rows = step.rows.map(([id, kind, start, tokens, drafts, accepted]) => ({ id, kind, start, tokens, drafts, accepted }));
    step.prompt = step.rows.reduce((sum, row) => sum + (row.kind === DECODE ? 0 : row.tokens), 0);
    const present = new Set(step.rows.map((row) => row.id));
    const free = this.lanes.map((id) => id === null || !present.has(id));
    for (const row of step.rows) {
      let lane = this.lanes.indexOf(row.id);
      if (lane < 0) {
        row.joined = true;
        lane = free.indexOf(true);
        if (lane >= 0) {
          this.lanes[lane] = row.id;
          free[lane] = false;
        }
      }
      if (lane >= 0) step.lanes.set(lane, row);
    }
    this.steps.push(step);
  }

  /** Tokens a second over the last two seconds, on the server's clock. */
  rates(now, window = 2e6) {
    let [said, prompt] = [0, 0];
    for (let place = this.steps.length - 1; place >= 0 && this.steps[place].at + this.steps[place].total > now - window; place--) {
      said += this.steps[place].said;
      prompt += this.steps[place].prompt;
    }
    return { said: (said / window) * 1e6, prompt: (prompt / window) * 1e6 };
  }
}

const isDark = () => document.documentElement.dataset.theme === "dark";

/** A colour for a request: neighbours in number are far apart in hue. */
export const colour = (id) => `oklch(${isDark() ? 0.76 : 0.6} 0.145 ${((id * 137.508) % 360).toFixed(1)})`;

/** What can be read on any of those colours. */
export const onColour = () => (isDark() ? "#0d1517" : "#ffffff");
