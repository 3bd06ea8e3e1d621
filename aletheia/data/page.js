"use strict";
// Filtering and opening rows. The page can be read without it.
(() => {
  const root = document.documentElement;
  const toggle = document.getElementById("theme");
  function setTheme(theme, keep) {
    root.dataset.theme = theme;
    toggle.textContent = theme === "dark" ? "Light" : "Dark";
    if (keep) try { localStorage.setItem("aletheia-theme", theme); } catch { /* a page that may keep nothing */ }
  }
  toggle.hidden = false;
  toggle.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark", true));
  setTheme(root.dataset.theme, false);

  const form = document.getElementById("filter");
  if (!form) return;
  const rows = [...document.querySelectorAll("details.row")];
  const texts = new Map(rows.map((row) => [row, row.querySelector("summary").textContent.toLowerCase()]));
  const any = rows.some((row) => "long" in row.dataset);
  const { text, domain, long, count } = form.elements;
  if (!any) long.closest("label").hidden = true;

  function filter() {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !(texts.get(row).includes(wanted) && (!domain.value || row.dataset.domain === domain.value) &&
        (!long.checked || "long" in row.dataset));
      shown += !row.hidden;
    }
    count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
    document.getElementById("none").hidden = shown > 0;
  }
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  const every = document.getElementById("all");
  every.hidden = false;
  every.addEventListener("click", () => {
    const open = every.textContent === "Open all";
    for (const row of rows) if (!row.hidden) row.open = open;
    every.textContent = open ? "Close all" : "Open all";
  });
})();
