"use strict";
// Algorithm 1's choices over stored verdicts: the same numbers as study.analysis (tests/test_site.py compares).

/** Share of successes with its Wilson interval. */
function wilson(successes, n, z) {
  if (n === 0) return { value: NaN, low: 0, high: 1 };
  const share = successes / n;
  const centre = (share + z ** 2 / (2 * n)) / (1 + z ** 2 / n);
  const half = (z / (1 + z ** 2 / n)) * Math.sqrt((share * (1 - share)) / n + z ** 2 / (4 * n ** 2));
  return { value: share, low: Math.min(Math.max(centre - half, 0), share),
           high: Math.max(Math.min(centre + half, 1), share) };
}

/** Mean paired difference with its Bonett–Price interval. */
function bonettPrice(differences, z) {
  const n = differences.length + 2;
  const sum = differences.reduce((a, d) => a + d, 0);
  const squares = differences.reduce((a, d) => a + d * d, 0);
  const centre = sum / n;
  const half = (z * Math.sqrt((squares + 2) / n - centre ** 2)) / Math.sqrt(n);
  return { value: sum / differences.length, low: Math.max(centre - half, -1), high: Math.min(centre + half, 1) };
}

/**
 * What comes out if the samples with h < tau take their adapted answer, the others base's; with `accept` only
 * where the adapted model finds its answer likelier than base found its own. Seeds are averaged per sample.
 * An adapted answer that was never made is counted in `missing`: then there are bounds and no accuracy.
 */
function evaluate(entry, { h, tau, accept }, z) {
  const score = entry.h[h].values, [before, after] = entry.accept || [];
  const out = { needed: 0, missing: 0, taken: 0, rows: 0, gained: 0, lost: 0, written: 0, trained: 0, base: 0 };
  const base = [], means = [], bounds = [0, 0], differences = [];
  for (let start = 0; start < entry.base.length; start += entry.seeds) {
    const own = [], chosen = [], lowest = [], highest = [], pairs = [];
    for (let i = start; i < start + entry.seeds; i++) {
      if (!"01".includes(entry.base[i])) continue;
      own.push(+entry.base[i]);
      if (score[i] === null) continue;
      out.rows += 1;
      out.base += entry.tokens.base[i] || 0;
      const flagged = score[i] < tau;
      const made = entry.adapted[i];
      if (flagged) {
        out.needed += 1;
        out.written += entry.tokens.written[i] || 0;
        out.trained += entry.tokens.trained[i] || 0;
        if (made === "-") {
          out.missing += 1;
          lowest.push(0), highest.push(1);
          continue;
        }
      }
      const take = flagged && (!accept || (after[i] !== null && before[i] !== null && after[i] > before[i]));
      out.taken += take;
      if (take && made === "x") continue;  // the machine failed: left out, never wrong
      const verdict = take ? +made : +entry.base[i];
      chosen.push(verdict), lowest.push(verdict), highest.push(verdict);
      pairs.push(verdict - +entry.base[i]);
    }
    const mean = (list) => list.reduce((a, x) => a + x, 0) / list.length;
    if (own.length) base.push(mean(own));
    if (lowest.length) bounds[0] += mean(lowest), bounds[1] += mean(highest), means.push(mean(chosen));
    if (pairs.length) differences.push(mean(pairs));
  }
  const total = (list) => list.reduce((a, x) => a + x, 0);
  out.n = means.length;
  out.before = { n: base.length, ...wilson(total(base), base.length, z) };
  out.bounds = bounds.map((x) => x / out.n);
  if (out.missing || !out.n) return out;
  out.accuracy = wilson(total(means), out.n, z);
  out.difference = { n: differences.length, ...bonettPrice(differences, z) };
  out.gained = differences.filter((d) => d > 0).length;
  out.lost = differences.filter((d) => d < 0).length;
  return out;
}

// --- the page -------------------------------------------------------------------------------------------

function start() {
  const { z, entries } = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const entry = () => entries[+at("entry").value];
  const accept = () => Boolean(entry().accept) && at("accept").value === "likelier";
  const signed = (x, digits = 1) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
  const percent = (e) => `${(100 * e.value).toFixed(1)} % [${(100 * e.low).toFixed(1)}, ${(100 * e.high).toFixed(1)}]`;
  const points = (e) => `${signed(100 * e.value)} [${signed(100 * e.low)}, ${signed(100 * e.high)}]`;
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });

  entries.forEach((e, i) => {
    const said = [e.benchmark, `${e.mode} adapters`, `n = ${e.base.length / e.seeds}`, e.inference === "direct" ? "" : e.inference,
                  `run ${e.run}`, e.variant && `variant ${e.variant}`, e.model.split(",")[0]];
    at("entry").append(option(i, said.filter(Boolean).join(" · ")));
  });

  /** Another set of answers: its own H, its own acceptance; τ goes where the run had it. */
  function choose() {
    const chosen = at("h").value;
    at("h").replaceChildren(...Object.entries(entry().h).map(([k, h]) => option(k, h.name)));
    if (chosen in entry().h) at("h").value = chosen;
    at("accepting").hidden = !entry().accept;
    at("tau").value = entry().tau;
    show();
  }

  function show() {
    const e = entry(), tau = +at("tau").value, h = at("h").value;
    const r = evaluate(e, { h, tau, accept: accept() }, z);
    at("tau-value").textContent = tau > 1 ? "above 1: everyone" : tau.toFixed(2);
    const share = r.rows ? ` (${((100 * r.needed) / r.rows).toFixed(1)} %)` : "";
    at("base").textContent = `${percent(r.before)}, n = ${r.before.n}`;
    at("adapted").textContent = `${r.needed} of ${r.rows} answers${share}`
      + (accept() ? `; ${r.taken} adapted replies stand` : "");
    at("accuracy").textContent = r.accuracy ? `${percent(r.accuracy)}, n = ${r.n}`
      : `between ${(100 * r.bounds[0]).toFixed(1)} and ${(100 * r.bounds[1]).toFixed(1)} %, n = ${r.n}`;
    at("difference").textContent = r.difference ? `${points(r.difference)} points, n = ${r.difference.n}` : "–";
    at("changed").textContent = r.difference ? `${r.gained} gained, ${r.lost} lost` : "–";
    at("cost").textContent = r.missing || !r.rows ? "–"
      : `${(r.written / r.rows).toFixed(0)} tokens more written per question (base: ${(r.base / r.rows).toFixed(0)}), `
      + `${(r.trained / r.rows).toFixed(0)} trained on`;
    at("note").textContent = r.missing
      ? `${r.missing} of the ${r.needed} adapted answers that this needs were never made. The accuracy lies between the two bounds, whatever they would have been.`
      : r.difference && r.difference.low > 0 ? "Better than base at this setting; it was chosen by looking."
      : r.difference && r.difference.high < 0 ? "Worse than base at this setting."
      : "The difference can't be told from zero.";
    draw(e, h, tau);
  }

  /** The difference to base over all thresholds, with its interval; bounds alone where answers are missing. */
  function draw(e, h, tau) {
    const grid = Array.from({ length: 102 }, (_, i) => i / 100);
    const all = grid.map((t) => {
      const r = evaluate(e, { h, tau: t, accept: accept() }, z);
      return { t, d: r.difference, b: { low: r.bounds[0] - r.before.value, high: r.bounds[1] - r.before.value } };
    });
    const there = all.filter((p) => p.d);
    const most = Math.max(0.05, ...there.flatMap((p) => [Math.abs(p.d.low), Math.abs(p.d.high)]));
    const x = (t) => 52 + (t / 1.01) * 570, y = (v) => 120 - Math.max(-1, Math.min(1, v / most)) * 96;
    const line = (list, end, of = "d") => list.map((p) => `${x(p.t).toFixed(1)},${y(p[of][end]).toFixed(1)}`);
    const band = (list, of, name) =>
      `<polygon class="${name}" points="${[...line(list, "low", of), ...line(list, "high", of).reverse()].join(" ")}"/>`;
    const text = (px, py, s, anchor = "middle") => `<text x="${px}" y="${py}" text-anchor="${anchor}">${s}</text>`;
    const runs = [];
    all.forEach((p, i) => (i && Boolean(all[i - 1].d) === Boolean(p.d) ? runs.at(-1).push(p) : runs.push([p])));
    const here = all.find((p) => Math.abs(p.t - tau) < 1e-9 && p.d);
    at("chart").innerHTML = runs.map((run) => !run[0].d ? band(run, "b", "bounds")
      : band(run, "d", "band") + `<polyline class="line" points="${line(run, "value").join(" ")}"/>`).join("")
      + `<line class="zero" x1="52" x2="622" y1="120" y2="120"/>`
      + `<line class="here" x1="${x(tau)}" x2="${x(tau)}" y1="20" y2="220"/>`
      + (here ? `<circle class="dot" cx="${x(tau)}" cy="${y(here.d.value)}" r="5"/>` : "")
      + [most, 0, -most].map((v) => text(46, y(v) + 4, v ? signed(100 * v) : "0", "end")).join("")
      + [0, 0.25, 0.5, 0.75, 1].map((t) => text(x(t), 238, t)).join("") + text(337, 256, "τ")
      + text(52, 12, "difference to base, points, 95 % interval", "start");
    at("chart").setAttribute("aria-label", there.length
      ? `Difference to base by τ: from ${points(there[0].d)} at ${there[0].t} to ${points(there.at(-1).d)} at ${there.at(-1).t}`
      : "No threshold has all the answers it needs");
  }

  at("entry").addEventListener("change", choose);
  for (const id of ["h", "accept", "tau"]) at(id).addEventListener("input", show);
  if (entries.length) choose();
  else at("note").textContent = "No committed run has both base's and adapted answers.";
}

document.addEventListener("DOMContentLoaded", start);
