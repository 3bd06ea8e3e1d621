"use strict";
// A blind comparison after the other. Which answer is whose this page never learns; all text goes in as text nodes.
(() => {
  const find = (id) => document.getElementById(id);
  const buttons = [...document.querySelectorAll("#choices button")];
  const SIDES = { left: "A", right: "B" };
  const TAGS = new Set("p h3 ul ol li blockquote hr pre code em strong s span mark table thead tbody tr th td".split(" "));
  let reviewer = "", state = null, busy = false;

  // ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────

  class Stale extends Error {}

  async function api(path, body) {
    const request = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const response = await fetch(`api/${path}`, request).catch(() => { throw new Error("the server cannot be reached"); });
    const said = await response.json().catch(() => ({}));
    if (response.ok) return said;
    const reason = said.error?.message ?? `the server answered ${response.status}`;
    throw response.status === 409 ? new Stale(reason) : new Error(reason);
  }

  // One at a time: a key pressed meanwhile does nothing, so that no vote falls on what was not seen yet.
  async function send(path, body, told) {
    if (busy) return;
    busy = true;
    fault("");
    try {
      state = await api(path, { reviewer, ...body });
      show(told);
    } catch (error) {
      if (error instanceof Stale) await again();
      else fault(`${path === "next" ? "Nothing can be shown" : "Not kept"}: ${error.message}. Try again.`);
    } finally {
      busy = false;
      find("undo").disabled = !state?.done;
    }
  }

  async function again() {
    try {
      state = await api("next", { reviewer });
      show("");
      fault("Another tab went on under this name. Nothing was counted twice; here is what is next.");
    } catch (error) {
      fault(`Nothing can be shown: ${error.message}. Try again.`);
    }
  }

  // ── What is shown ────────────────────────────────────────────────────────────────────────────────────────────────

  function fault(text) {
    find("fault").textContent = text;
    find("fault").hidden = !text;
  }

  function element(name, ...children) {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  }

  function grown(node) {
    if (typeof node === "string") return node;
    if (!TAGS.has(node.tag)) return element("span", ...node.of.map(grown));
    const made = element(node.tag, ...node.of.map(grown));
    if (node.tag === "ol" && Number.isInteger(node.start)) made.start = node.start;
    if (node.tag === "pre") made.tabIndex = 0; // so that keys can scroll it
    if (node.tag !== "table") return made;
    const scroll = element("div", made);
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    return scroll;
  }

  function duration(seconds) {
    if (seconds < 90) return "about a minute left";
    return seconds < 5400 ? `about ${Math.round(seconds / 60)} min left` : `about ${(seconds / 3600).toFixed(1)} h left`;
  }

  function show(told) {
    const { done, total, item, seconds_left: seconds, complete } = state;
    for (const one of document.querySelectorAll(".progress, .tick, #who")) one.hidden = false;
    find("bar").max = total;
    find("bar").value = done;
    find("left").textContent = `${done} of ${total} judged${item && seconds !== null ? `, ${duration(seconds)}` : ""}`;
    find("who").textContent = reviewer;
    try { sessionStorage.setItem("aletheia-reviewer", reviewer); } catch { /* then the name is asked for again */ }
    find("name-form").hidden = true;
    find("work").hidden = !item;
    find("choices").hidden = false;
    for (const button of buttons) button.hidden = !item && button.id !== "undo";
    find("done").hidden = Boolean(item);
    find("told").textContent = told;
    find("then").textContent = complete
      ? "The review can be opened: aletheia review EXP --result, in the terminal."
      : "It opens once others have judged too, or once the evidence is enough.";
    if (item) {
      find("place").textContent = `Question ${done + 1} of ${total}`;
      find("prompt").replaceChildren(...item.prompt.map(grown));
      for (const side of Object.keys(SIDES)) find(`${side}-text`).replaceChildren(...item[side].map(grown));
      fill(state.undone ?? { ratings: {}, comment: "", choice: "" });
    }
    scrollTo(0, 0);
    find(item ? "place" : "thanks").focus({ preventScroll: true });
  }

  function fill({ ratings, comment, choice }) {
    for (const radio of find("ratings").querySelectorAll("input")) {
      const { side, what } = radio.closest("fieldset").dataset;
      radio.checked = ratings[side]?.[what] === Number(radio.value);
    }
    find("comment").value = comment;
    for (const button of buttons) button.classList.toggle("was", Boolean(choice) && button.value === choice);
    if (comment || Object.keys(ratings).length) find("more").open = true;
  }

  // ── Votes ────────────────────────────────────────────────────────────────────────────────────────────────────────

  function rated() {
    const ratings = {};
    for (const radio of find("ratings").querySelectorAll("input:checked")) {
      const { side, what } = radio.closest("fieldset").dataset;
      (ratings[side] ??= {})[what] = Number(radio.value);
    }
    return ratings;
  }

  function vote(choice) {
    if (!state?.item) return;
    const told = { left: "A is better", right: "B is better", tie: "Tie", bad: "Both bad", skip: "Skipped" }[choice];
    const body = { seq: state.seq, item: state.item.id, choice, ratings: rated(), comment: find("comment").value };
    send("vote", body, `Kept: ${told}.`);
  }

  function undo() {
    if (state?.done) send("undo", { seq: state.seq }, "Taken back: judge this one again.");
  }

  for (const button of buttons) {
    button.addEventListener("click", () => (button.id === "undo" ? undo() : vote(button.value)));
  }

  function begin(name) {
    reviewer = name;
    return send("next", {}, "");
  }

  function known() {
    try { return sessionStorage.getItem("aletheia-reviewer") ?? ""; } catch { return ""; }
  }

  find("name-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (find("name").value.trim()) begin(find("name").value.trim());
  });

  // ── Ratings ──────────────────────────────────────────────────────────────────────────────────────────────────────

  function head(text) {
    const made = element("span", text);
    made.className = "top";
    made.setAttribute("aria-hidden", "true"); // each group says it by itself
    return made;
  }

  function group(what, words, side) {
    const legend = element("legend", `${words} of answer ${SIDES[side]}, 1 to 5`);
    legend.className = "unseen";
    const made = element("fieldset", legend);
    Object.assign(made.dataset, { what, side });
    for (let stars = 1; stars <= 5; stars++) {
      const radio = Object.assign(document.createElement("input"), { type: "radio", name: `${what}-${side}`, value: stars });
      const star = element("label", radio, element("span", String(stars)));
      star.className = "star";
      made.append(star);
    }
    return made;
  }

  function offerRatings(names) {
    find("ratings").append(head(""), head("Answer A"), head("Answer B"));
    for (const [what, words] of Object.entries(names)) {
      const label = element("span", words);
      label.setAttribute("aria-hidden", "true");
      find("ratings").append(label, group(what, words, "left"), group(what, words, "right"));
    }
  }

  function rate(group, stars) {
    const radios = [...group.querySelectorAll("input")];
    for (const radio of radios) radio.checked = Number(radio.value) === stars;
    const groups = [...find("ratings").querySelectorAll("fieldset")];
    const next = groups[groups.indexOf(group) + 1];
    if (!stars) radios[0].focus();
    else if (next) (next.querySelector("input:checked") ?? next.querySelector("input")).focus();
    else find("comment").focus();
  }

  // ── Keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  function open(id) {
    find("more").open = true;
    const target = id === "comment" ? find("comment") : find("ratings").querySelector("input:checked, input");
    target.focus();
    target.scrollIntoView({ block: "nearest" });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || find("work").hidden && find("done").hidden) return;
    const at = document.activeElement;
    const key = event.key.toLowerCase();
    if (key === "escape" && find("more").contains(at)) {
      event.preventDefault();
      find("place").focus();
      return;
    }
    const writes = at.id === "comment" || at.id === "name";
    if (writes || !find("keys").checked || event.repeat) return; // a key that is held votes once
    const group = at.closest("fieldset");
    const button = buttons.find((one) => one.dataset.key === key && !one.hidden);
    if (group && /^[0-5]$/.test(key)) rate(group, Number(key));
    else if (button) button.click();
    else if (key === "r" && state?.item) open("ratings");
    else if (key === "c" && state?.item) open("comment");
    else return;
    event.preventDefault();
  });

  (async () => {
    try {
      const about = await api("review");
      offerRatings(about.ratings);
      if (about.reviewer || known()) await begin(about.reviewer || known());
      if (state) return;
      find("name-form").hidden = false;
      find("name").focus();
    } catch (error) {
      fault(`Nothing can be shown: ${error.message}. Load the page again.`);
    }
  })();
})();
