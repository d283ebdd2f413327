"use strict";
// Ratings: what each rater said of each scan. They are kept in the browser (localStorage, under the folder's own key),
// merged with those that the workflow was given, and exported and imported as TSV. Of two ratings by one rater the newer counts.
const RATING_COLUMNS = ["participant_id", "session", "modality", "rater", "rating", "reasons", "comment", "time_sec",
  "report_hash", "timestamp"];
const MARKS = { __proto__: null, pass: "●", warn: "▲", fail: "✕" }; // without "constructor" and the like
// What a cell must be, where it is not empty; as in ratings.py.
const CELLS = {
  time_sec: /^\d+(\.\d*)?$/,
  report_hash: /^[0-9a-f]{12}$/,
  timestamp: /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/,
};
const REASONS = ["shading left", "contrast lost", "anatomy in the field", "mask wrong", "image itself"];

// sub-01_ses-a_run-1_T1w is participant, session and modality
function partsOf(scan) {
  const found = /^(sub-[^_]+)(?:_(ses-[^_]+))?_(.+)$/.exec(scan);
  return found ? [found[1], found[2] || "", found[3]] : [scan, "", ""];
}

// A cell is one line without tabs.
const cellText = (text) => String(text ?? "").split(/\s+/).filter(Boolean).join(" ");

// Reasons are kept while a rating changes, but a pass has none.
const reasonsOf = (entry) => (entry.rating === "pass" || !entry.reasons ? [] : entry.reasons.split(/;\s*/));

class Ratings {
  // hashes: scan -> report_hash. stored: objects with scan, rater, rating… that came with the page.
  constructor(hashes, stored, key) {
    this.hashes = hashes;
    this.key = key;
    this.rater = "";
    this.entries = new Map(); // of other scans too: of those that failed in this run, or are out of the sheet
    this.listed = new Set([...hashes.keys(), ...stored.map((entry) => entry.scan)]);
    this.saved = true;
    this.merge(stored);
    this.read();
  }

  static id = (entry) => `${entry.scan}\t${entry.rater}`;

  static time = (entry) => Date.parse(entry?.timestamp) || 0;

  // Takes over what is newer; returns how many.
  merge(entries) {
    let taken = 0;
    for (const entry of entries) {
      const old = this.entries.get(Ratings.id(entry));
      if (old && Ratings.time(old) >= Ratings.time(entry)) continue;
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
      localStorage.setItem(this.key, JSON.stringify({ rater: this.rater, entries: [...this.entries.values()] }));
      this.saved = true;
    } catch {
      this.saved = false;
    }
  }

  rename(rater) {
    const nameless = this.rater === "";
    this.rater = cellText(rater);
    if (nameless) this.adopt();
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

  of(scan) {
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
    return this.of(scan).find((entry) => entry.rater === this.rater);
  }

  others(scan) {
    return this.of(scan).filter((entry) => entry.rater !== this.rater);
  }

  disagree(scan) {
    return new Set(this.of(scan).map((entry) => entry.rating)).size > 1;
  }

  stale(entry) {
    const now = this.hashes.get(entry.scan);
    return Boolean(entry.report_hash && now && entry.report_hash !== now);
  }

  // Sets rating, reasons or comment of the present rater; a rating of "" takes it back.
  set(scan, change) {
    const old = this.mine(scan) || { rating: "", reasons: "", comment: "", time_sec: "" };
    const entry = { ...old, scan, rater: this.rater, ...change };
    // the last word is the newest, even where the clock of the one before was ahead
    const before = Ratings.time(this.entries.get(Ratings.id(entry)));
    entry.timestamp = new Date(Math.max(Date.now(), before + 1)).toISOString();
    if ("rating" in change) entry.report_hash = this.hashes.get(scan) || "";
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
      return RATING_COLUMNS.map((column) => cellText(all[column]) || "n/a").join("\t");
    });
    return `${[RATING_COLUMNS.join("\t"), ...lines].join("\n")}\n`;
  }

  // Merges an exported table; returns what happened, in words.
  fromTsv(text) {
    const lines = text.replace(/^\ufeff/, "").split(/\r?\n/).filter((line) => line.trim());
    const columns = (lines.shift() || "").split("\t");
    const missing = ["participant_id", "modality", "rater", "rating"].filter((name) => !columns.includes(name));
    if (missing.length) return `Nothing imported: there is no column ${missing.join(", ")}.`;
    const found = [];
    const wrong = [];
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
      else found.push({ scan, ...Object.fromEntries(RATING_COLUMNS.slice(3).map((name) => [name, row[name] ?? ""])) });
    }
    const taken = this.merge(found);
    this.write();
    const raters = [...new Set(found.map((entry) => entry.rater))].join(", ");
    const apart = [...this.hashes.keys()].filter((scan) => this.disagree(scan)).length;
    return [
      `${found.length} ratings by ${raters || "nobody"}: ${taken} taken over, ${found.length - taken} were here as new or newer;`,
      `raters disagree on ${apart} scans.`,
      wrong.length ? `Left out ${wrong.length}: ${wrong.slice(0, 3).join("; ")}${wrong.length > 3 ? "; …" : ""}.` : "",
    ].filter(Boolean).join(" ");
  }
}
