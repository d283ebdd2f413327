"use strict";
// Ratings: what each rater said of each scan. They are kept in the browser (localStorage, under the folder's own key),
// merged with those that the workflow was given, and exported and imported as TSV. Of two ratings by one rater the newer counts.
// Others' ratings of a scan are hidden until it has one's own, unless they are asked for.
const RATING_COLUMNS = ["participant_id", "session", "modality", "rater", "rating", "reasons", "comment", "time_sec",
  "report_hash", "timestamp"];
const MARKS = { __proto__: null, pass: "●", warn: "▲", fail: "✕" }; // without "constructor" and the like
// What a cell must be, where it is not empty; as in ratings.py.
const CELLS = {
  time_sec: /^\d+(\.\d*)?$/,
  report_hash: /^(sha256:)?[0-9a-f]{12}$/,
  timestamp: /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/,
};
const REASONS = ["shading left", "contrast lost", "anatomy in the field", "mask wrong", "image itself"];

// sub-01_ses-a_run-1_T1w is participant, session and modality
function partsOf(scan) {
  const found = /^(sub-[^_]+)(?:_(ses-[^_]+))?_(.+)$/.exec(scan);
  return found ? [found[1], found[2] || "", found[3]] : [scan, "", ""];
}

// Cohen's kappa of pairs of ratings, as in ratings.py; NaN where chance alone would agree on all.
function kappa(pairs, disagreement) {
  const degrees = Object.keys(MARKS).map((rating) => [0, 1].map((rater) => pairs.filter((pair) => pair[rater] === rating).length));
  let [found, chance] = [0, 0];
  for (const [a, b] of pairs) found += disagreement(Object.keys(MARKS).indexOf(a), Object.keys(MARKS).indexOf(b));
  for (const [i, [first]] of degrees.entries()) {
    for (const [j, [, second]] of degrees.entries()) chance += (disagreement(i, j) * first * second) / pairs.length;
  }
  return 1 - found / chance;
}

// A cell is one line without tabs.
const cellText = (text) => String(text ?? "").split(/\s+/).filter(Boolean).join(" ");

// Reasons are kept while a rating changes, but a pass has none.
const reasonsOf = (entry) => (entry.rating === "pass" || !entry.reasons ? [] : entry.reasons.split(/;\s*/));

const NOTHING = { rating: "", reasons: "", comment: "", time_sec: "", report_hash: "" };

class Ratings {
  // hashes: scan -> report_hash. stored: objects with scan, rater, rating… that came with the page.
  constructor(hashes, stored, key) {
    this.hashes = hashes;
    this.key = key;
    this.rater = "";
    this.entries = new Map(); // of other scans too: of those that failed in this run, or are out of the sheet
    this.listed = new Set([...hashes.keys(), ...stored.map((entry) => entry.scan)]);
    this.saved = true;
    this.open = false; // others' ratings are shown
    this.advance = false; // a pass leads to the next scan
    this.changes = []; // to be undone
    this.merge(stored.map((entry) => ({ ...entry, exported: true })));
    this.read();
  }

  static id = (entry) => `${entry.scan}\t${entry.rater}`;

  static time = (entry) => Date.parse(entry?.timestamp) || 0;

  // Takes over what is newer; returns how many.
  merge(entries) {
    let taken = 0;
    for (const entry of entries) {
      const old = this.entries.get(Ratings.id(entry));
      if (old && Ratings.time(old) >= Ratings.time(entry)) {
        // another tab has exported it
        if (entry.exported && old.timestamp === entry.timestamp) old.exported = true;
        continue;
      }
      this.entries.set(Ratings.id(entry), entry);
      taken += 1;
    }
    if (taken) this.byScan = null;
    return taken;
  }

  read() {
    try {
      const kept = JSON.parse(localStorage.getItem(this.key) || "{}");
      const nameless = this.rater === "";
      this.rater = kept.rater || this.rater;
      this.open = kept.open ?? this.open;
      this.advance = kept.advance ?? this.advance;
      this.merge(kept.entries || []);
      if (nameless) this.adopt(); // the name was given in another tab
    } catch {
      this.saved = false; // no storage, or not ours: the export still works
    }
  }

  write() {
    try {
      // another tab may have rated meanwhile
      const kept = JSON.parse(localStorage.getItem(this.key) || "{}");
      this.merge((kept.entries || []).filter((entry) => entry.rater));
      localStorage.setItem(this.key, JSON.stringify({ rater: this.rater, open: this.open, advance: this.advance, entries: [...this.entries.values()] }));
      this.saved = true;
    } catch {
      this.saved = false;
    }
  }

  rename(rater) {
    const nameless = this.rater === "";
    this.rater = cellText(rater);
    if (nameless) this.adopt();
    else this.changes = []; // they are somebody else's
    this.write();
  }

  // What was rated before a name was given is this rater's.
  adopt() {
    if (!this.rater) return;
    for (const entry of [...this.entries.values()].filter((e) => e.rater === "")) {
      this.entries.delete(Ratings.id(entry));
      this.merge([{ ...entry, rater: this.rater }]);
    }
    this.byScan = null;
  }

  // Everybody's, whether they may be seen or not.
  all(scan) {
    if (!this.byScan) {
      this.byScan = new Map();
      for (const entry of this.entries.values()) {
        if (!entry.rating) continue;
        if (!this.byScan.has(entry.scan)) this.byScan.set(entry.scan, []);
        this.byScan.get(entry.scan).push(entry);
      }
    }
    return this.byScan.get(scan) || [];
  }

  mine(scan) {
    return this.all(scan).find((entry) => entry.rater === this.rater);
  }

  hides(scan) {
    const own = this.mine(scan);
    return !this.open && (!own || this.stale(own));
  }

  of(scan) {
    return this.hides(scan) ? this.all(scan).filter((entry) => entry.rater === this.rater) : this.all(scan);
  }

  others(scan) {
    return this.of(scan).filter((entry) => entry.rater !== this.rater);
  }

  // What this rater wrote, though there may be no rating yet.
  note(scan) {
    return this.entries.get(Ratings.id({ scan, rater: this.rater })) || NOTHING;
  }

  disagree(scan) {
    return new Set(this.of(scan).map((entry) => entry.rating)).size > 1;
  }

  stale(entry) {
    const now = this.hashes.get(entry.scan);
    return Boolean(entry.report_hash && now && entry.report_hash !== now);
  }

  // How any two raters agree on the scans that both have rated since these last changed.
  agreements() {
    const pairs = new Map();
    if (new Set([...this.entries.values()].map((entry) => entry.rater)).size < 2) return [];
    for (const scan of this.hashes.keys()) {
      const its = [...this.of(scan)].sort((a, b) => (a.rater < b.rater ? -1 : 1));
      for (const [n, a] of its.entries()) {
        for (const b of its.slice(n + 1)) {
          if (a.report_hash && b.report_hash && a.report_hash !== b.report_hash) continue;
          const key = JSON.stringify([a.rater, b.rater]);
          if (!pairs.has(key)) pairs.set(key, []);
          pairs.get(key).push([a.rating, b.rating]);
        }
      }
    }
    return [...pairs].sort().map(([key, both]) => ({
      raters: JSON.parse(key),
      scans: both.length,
      alike: both.filter(([a, b]) => a === b).length,
      kappa: kappa(both, (i, j) => Number(i !== j)),
      weighted: kappa(both, (i, j) => Math.abs(i - j)),
    }));
  }

  // Rated, or changed, and in no file yet.
  unexported() {
    const fresh = (entry) => entry.exported === false || (entry.exported === undefined && entry.rating);
    return [...this.entries.values()].filter((entry) => entry.rater === this.rater && this.listed.has(entry.scan) && fresh(entry));
  }

  // What has been written on scans that have no rating: a table of ratings has no place for it.
  unrated() {
    return [...this.entries.values()].filter((entry) => entry.rater === this.rater && this.hashes.has(entry.scan) && entry.comment && !entry.rating);
  }

  // These stand in a file now.
  markExported(entries) {
    for (const entry of entries) if (this.listed.has(entry.scan)) entry.exported = true;
    this.write();
  }

  // Takes the last change back; returns its scan.
  undo() {
    const last = this.changes.pop();
    if (!last) return undefined;
    this.set(last.scan, last.before);
    this.changes.pop(); // an undo is no change
    return last.scan;
  }

  // Sets rating, reasons or comment of the present rater; a rating of "" takes it back.
  set(scan, change) {
    const old = this.note(scan);
    const { rating, reasons, comment, time_sec, report_hash } = old;
    this.changes.push({ scan, before: { rating, reasons, comment, time_sec, report_hash } });
    const entry = { ...old, scan, rater: this.rater };
    if ("rating" in change) entry.report_hash = this.hashes.get(scan) || "";
    Object.assign(entry, change);
    entry.exported = old.exported === undefined ? undefined : false;
    // the last word is the newest, even where the clock of the one before was ahead
    const before = Ratings.time(this.entries.get(Ratings.id(entry)));
    entry.timestamp = new Date(Math.max(Date.now(), before + 1)).toISOString();
    this.entries.set(Ratings.id(entry), entry);
    this.byScan = null;
    this.write();
  }

  toTsv() {
    const rows = [...this.entries.values()].filter((entry) => entry.rating && this.listed.has(entry.scan));
    rows.sort((a, b) => (Ratings.id(a) < Ratings.id(b) ? -1 : 1));
    const lines = rows.map((entry) => {
      const [participant_id, session, modality] = partsOf(entry.scan);
      const all = { ...entry, participant_id, session, modality, rater: entry.rater || "unnamed", reasons: reasonsOf(entry).join("; ") };
      // spreadsheets take 012345678901 and 1234e5678901 for numbers
      if (all.report_hash) all.report_hash = `sha256:${all.report_hash}`;
      return RATING_COLUMNS.map((column) => cellText(all[column]) || "n/a").join("\t");
    });
    return `${[RATING_COLUMNS.join("\t"), ...lines].join("\n")}\n`;
  }

  // Merges an exported table; returns what happened, in words, and what was left out.
  fromTsv(text) {
    const lines = text.replace(/^\ufeff/, "").split(/\r?\n/).filter((line) => line.trim());
    const columns = (lines.shift() || "").split("\t");
    const missing = ["participant_id", "modality", "rater", "rating"].filter((name) => !columns.includes(name));
    const wrong = missing.map((name) => `there is no column ${name}`);
    if (missing.length) return { told: `Nothing imported: ${wrong.join(", ")}.`, wrong };
    const found = [];
    for (const [number, line] of lines.entries()) {
      const cells = line.split("\t").map((cell) => (cell.trim() === "n/a" ? "" : cellText(cell)));
      const row = Object.fromEntries(columns.map((name, n) => [name, cells[n]]));
      const scan = [row.participant_id, row.session, row.modality].filter(Boolean).join("_");
      const odd = Object.keys(CELLS).find((name) => row[name] && !CELLS[name].test(row[name]));
      let problem = "";
      if (cells.length !== columns.length) problem = "another number of columns than the header";
      else if (!this.hashes.has(scan)) problem = `${scan || "no scan"} is not in this dataset`;
      else if (!row.rater) problem = "no rater";
      else if (!MARKS[row.rating]) problem = row.rating ? `rating ${row.rating} is none of pass, warn, fail` : "no rating";
      else if (odd) problem = `${odd} ${row[odd]} is not valid`;
      if (problem) wrong.push(`line ${number + 2}: ${problem}`);
      else {
        const entry = Object.fromEntries(RATING_COLUMNS.slice(3).map((name) => [name, row[name] ?? ""]));
        found.push({ ...entry, scan, exported: true, report_hash: entry.report_hash.replace("sha256:", "") });
      }
    }
    const taken = this.merge(found);
    this.write();
    const raters = [...new Set(found.map((entry) => entry.rater))].join(", ");
    const apart = [...this.hashes.keys()].filter((scan) => this.disagree(scan)).length;
    const told = [
      `${found.length} ratings by ${raters || "nobody"}: ${taken} taken over, ${found.length - taken} were here as new or newer;`,
      `raters disagree on ${apart} scans.`,
      wrong.length ? `Left out ${wrong.length}: ${wrong.slice(0, 3).join("; ")}${wrong.length > 3 ? "; …" : ""}.` : "",
    ].filter(Boolean).join(" ");
    return { told, wrong };
  }
}
