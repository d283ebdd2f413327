"use strict";
// Ratings: what each rater said of each scan. They are kept in the browser (localStorage, under the folder's own key),
// merged with those that the workflow was given, and exported and imported as TSV. Of two ratings by one rater the newer counts.
const RATING_COLUMNS = ["participant_id", "session", "modality", "rater", "rating", "reasons", "comment", "time_sec",
  "report_hash", "timestamp"];
const MARKS = { pass: "●", warn: "▲", fail: "✕" };
const REASONS = ["shading left", "contrast lost", "anatomy in the field", "mask wrong", "image itself"];

// sub-01_ses-a_run-1_T1w is participant, session and modality
function partsOf(scan) {
  const found = /^(sub-[^_]+)(?:_(ses-[^_]+))?_(.+)$/.exec(scan);
  return found ? [found[1], found[2] || "", found[3]] : [scan, "", ""];
}

// A cell is one line without tabs.
const cellText = (text) => String(text ?? "").split(/\s+/).filter(Boolean).join(" ");

class Ratings {
  // hashes: scan -> report_hash. stored: objects with scan, rater, rating… that came with the page.
  constructor(hashes, stored, key) {
    this.hashes = hashes;
    this.key = key;
    this.rater = "";
    this.entries = new Map();
    this.saved = true;
    this.merge(stored);
    this.read();
  }

  static id = (entry) => `${entry.scan}\t${entry.rater}`;

  // Takes over what is newer; returns how many.
  merge(entries) {
    let taken = 0;
    for (const entry of entries) {
      const old = this.entries.get(Ratings.id(entry));
      if (old && (old.timestamp || "") >= (entry.timestamp || "")) continue;
      this.entries.set(Ratings.id(entry), entry);
      taken += 1;
    }
    if (taken) this.byScan = null;
    return taken;
  }

  read() {
    try {
      const kept = JSON.parse(localStorage.getItem(this.key) || "{}");
      this.rater = kept.rater || this.rater;
      this.merge((kept.entries || []).filter((entry) => this.hashes.has(entry.scan)));
    } catch {
      this.saved = false; // no storage, or not ours: the export still works
    }
  }

  write() {
    try {
      // another tab may have rated meanwhile
      const kept = JSON.parse(localStorage.getItem(this.key) || "{}");
      this.merge((kept.entries || []).filter((entry) => entry.rater && this.hashes.has(entry.scan)));
      localStorage.setItem(this.key, JSON.stringify({ rater: this.rater, entries: [...this.entries.values()] }));
      this.saved = true;
    } catch {
      this.saved = false;
    }
  }

  rename(rater) {
    const before = this.rater;
    this.rater = cellText(rater);
    if (before === "" && this.rater) {
      // what was rated before a name was given is this rater's
      for (const entry of [...this.entries.values()].filter((e) => e.rater === "")) {
        this.entries.delete(Ratings.id(entry));
        this.merge([{ ...entry, rater: this.rater }]);
      }
      this.byScan = null;
    }
    this.write();
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
    const entry = { ...old, scan, rater: this.rater, ...change, timestamp: new Date().toISOString() };
    if ("rating" in change) entry.report_hash = this.hashes.get(scan) || "";
    this.entries.set(Ratings.id(entry), entry);
    this.byScan = null;
    this.write();
  }

  toTsv() {
    const rows = [...this.entries.values()].filter((entry) => entry.rating);
    rows.sort((a, b) => (Ratings.id(a) < Ratings.id(b) ? -1 : 1));
    const lines = rows.map((entry) => {
      const [participant_id, session, modality] = partsOf(entry.scan);
      const all = { ...entry, participant_id, session, modality, rater: entry.rater || "unnamed" };
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
      const cells = line.split("\t");
      const row = Object.fromEntries(columns.map((name, n) => [name, cells[n] === "n/a" ? "" : cellText(cells[n])]));
      const scan = [row.participant_id, row.session, row.modality].filter(Boolean).join("_");
      if (!this.hashes.has(scan)) wrong.push(`line ${number + 2}: ${scan || "no scan"} is not in this dataset`);
      else if (!MARKS[row.rating] || !row.rater) wrong.push(`line ${number + 2}: ${row.rating ? "no rater" : "no rating"}`);
      else {
        const { reasons, comment, time_sec, report_hash, timestamp, rater, rating } = row;
        found.push({ scan, rater, rating, reasons, comment, time_sec, report_hash, timestamp });
      }
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
