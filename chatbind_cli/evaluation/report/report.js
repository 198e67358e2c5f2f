"use strict";
(() => {
  const form = document.getElementById("filter");
  const count = document.getElementById("count");
  const nothing = document.getElementById("nothing");
  const entries = [...document.querySelectorAll("details.entry")].map((node, place) => ({ node, place, text: null }));
  const fields = [...form.elements].filter((field) => field.name);
  const read = () => fields
    .map((field) => [field.name, field.type === "checkbox" ? (field.checked ? "1" : "") : field.value.trim()])
    .filter(([, value]) => value !== "");
  const says = (entry, wanted) => {
    // The text of thousands of answers is gathered at the first search, not when the page opens.
    if (entry.text === null) entry.text = entry.node.textContent.toLowerCase();
    return entry.text.includes(wanted);
  };
  // How far the second answer is ahead; what failed has no scores, and comes last.
  const gap = (entry) => (entry.node.dataset.gap === "" ? null : Number(entry.node.dataset.gap));
  const sorts = {
    "": (a, b) => a.place - b.place,
    second: (a, b) => gap(b) - gap(a),
    first: (a, b) => gap(a) - gap(b),
    wide: (a, b) => Math.abs(gap(b)) - Math.abs(gap(a)),
  };
  let sorted = "";
  const sort = (by) => {
    if (by === sorted) return;
    sorted = by;
    entries.sort((a, b) => (by && (gap(a) === null) - (gap(b) === null)) || sorts[by](a, b) || sorts[""](a, b));
    document.getElementById("entries").append(...entries.map((entry) => entry.node));
  };
  const apply = () => {
    sort(form.elements.sort.value);
    const wanted = read().filter(([name]) => name !== "sort");
    let shown = 0;
    for (const entry of entries) {
      const fits = wanted.every(([name, value]) =>
        name === "text" ? says(entry, value.toLowerCase()) : entry.node.dataset[name] === value);
      entry.node.hidden = !fits;
      if (fits) shown += 1;
    }
    count.textContent = shown === entries.length ? `${shown} questions` : `${shown} of ${entries.length} questions`;
    nothing.hidden = shown > 0;
  };
  const remember = () => {
    const query = new URLSearchParams(read()).toString();
    history.replaceState(null, "", query ? `#?${query}` : location.pathname + location.search);
  };
  const reset = () => { form.reset(); apply(); remember(); };
  const follow = () => {
    if (location.hash.startsWith("#?")) {
      const wanted = new URLSearchParams(location.hash.slice(2));
      form.reset();
      for (const field of fields) {
        const value = wanted.get(field.name) ?? "";
        if (field.type === "checkbox") field.checked = value === "1";
        else if (field.type === "search" || [...field.options].some((option) => option.value === value)) field.value = value;
      }
      apply();
      document.getElementById("questions").scrollIntoView();
      return;
    }
    let anchor = location.hash.slice(1);
    try { anchor = decodeURIComponent(anchor); } catch { /* no escape of ours: as it stands */ }
    const node = document.getElementById(anchor);
    if (!node || !node.matches("details.entry")) return;
    if (node.hidden) { form.reset(); apply(); }
    node.open = true;
    node.querySelector("summary").focus({ preventScroll: true });
    node.scrollIntoView();
  };
  const current = () => document.activeElement && document.activeElement.closest("details.entry");
  const move = (step) => {
    const shown = entries.filter((entry) => !entry.node.hidden).map((entry) => entry.node);
    if (!shown.length) return;
    const at = shown.indexOf(current());
    const next = at < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(Math.max(at + step, 0), shown.length - 1);
    shown[next].querySelector("summary").focus();
    shown[next].scrollIntoView({ block: "nearest" });
  };
  // Media get their data when they are first seen: thousands of pictures would be decoded else.
  document.addEventListener("toggle", (event) => {
    if (!event.target.open) return;
    for (const node of event.target.querySelectorAll("[data-media]")) {
      node.src = document.getElementById(node.dataset.media).textContent;
      node.removeAttribute("data-media");
    }
  }, true);
  let pending = 0;
  form.addEventListener("input", () => {
    clearTimeout(pending);
    pending = setTimeout(() => { apply(); remember(); }, 80);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("reset").addEventListener("click", reset);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "o" && current()) current().open = !current().open;
    else if (event.key === "/") { event.preventDefault(); form.elements.text.focus(); }
  });
  window.addEventListener("hashchange", follow);
  form.hidden = false;
  follow();
})();
