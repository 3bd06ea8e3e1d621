"use strict";
// Before anything is drawn: #dark or #light in the address, else what was chosen here before, else the system's.
(() => {
  const asked = location.hash.slice(1).split("&").find((part) => part === "dark" || part === "light");
  let kept = null;
  try { kept = localStorage.getItem("aletheia-theme"); } catch { /* a page that may keep nothing */ }
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = asked || kept || system;
})();
