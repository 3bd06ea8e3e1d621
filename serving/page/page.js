"use strict";
// The chat. Whatever a model says goes in as text nodes: nothing here writes markup, and the page's policy forbids it.
(() => {
  const find = (id) => document.getElementById(id);
  const [log, main, question, model] = [find("log"), document.querySelector("main"), find("question"), find("model")];
  let messages = []; // of the conversation, as the model is sent them
  let running = null; // the AbortController of the answer that is streaming
  let key = "";
  try { key = sessionStorage.getItem("aletheia-key") ?? ""; } catch { /* a page that may keep nothing */ }

  // ── The API ──────────────────────────────────────────────────────────────────────────────────────────────────────

  async function api(path, body, signal) {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
    const response = await fetch(path, request).catch(() => { throw new Error("the server cannot be reached"); });
    if (response.ok) return response;
    if (response.status === 401) askForKey();
    throw new Error(reason(await response.text()) || `the server answered ${response.status} ${response.statusText}`);
  }

  function reason(text) {
    try {
      const { error, detail } = JSON.parse(text);
      return String(error?.message ?? error ?? detail ?? "");
    } catch {
      return ""; // not the API's: a proxy's page, perhaps
    }
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message ?? event.error);
        yield event;
      }
      if (done) throw new Error("the connection ended in the middle of the answer");
    }
  }

  async function loadModels() {
    try {
      const { data } = await (await api("v1/models")).json();
      model.replaceChildren(...data.map(({ id }) => new Option(id, id)));
      show(find("fault"), "");
    } catch (error) {
      show(find("fault"), `The models could not be listed: ${error.message}`);
    }
  }

  function askForKey() {
    find("key-form").hidden = false;
    find("key").focus();
  }

  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = find("key").value.trim();
    try { sessionStorage.setItem("aletheia-key", key); } catch { /* then only until the page is loaded again */ }
    find("key").value = "";
    find("key-form").hidden = true;
    question.focus();
    loadModels();
  });

  // ── Text: code fences, inline code and bold; all else of Markdown stays as it was written ───────────────────────────

  function blocks(text) {
    const found = [];
    let fence = "", open = null;
    for (const line of text.split("\n")) {
      const mark = /^\s*(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
      if (mark && !fence) {
        fence = mark[1];
        found.push((open = { code: true, language: mark[2].trim(), lines: [] }));
      } else if (mark && mark[1].startsWith(fence) && !mark[2].trim()) {
        fence = "";
        open = null;
      } else if (!fence && !line.trim()) {
        open = null; // a blank line ends a paragraph
      } else {
        if (!open) found.push((open = { code: false, language: "", lines: [] }));
        open.lines.push(line);
      }
    }
    return found.map(({ code, language, lines }) => ({ code, language, text: lines.join("\n") }));
  }

  function element(name, ...children) {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  }

  function block({ code, language, text }) {
    if (!code) {
      return element("p", ...text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, index) =>
        index % 2 === 0 ? part : part[0] === "`" ? element("code", part.slice(1, -1)) : element("strong", part.slice(2, -2))));
    }
    const pre = element("pre", element("code", text));
    pre.tabIndex = 0; // so that keys can scroll it
    return element("figure", ...(language ? [element("figcaption", language)] : []), pre);
  }

  // Draws only what has changed since the last time, at most once a frame.
  function painter(node) {
    let drawn = [], text = "", frame = 0;
    function draw() {
      frame = 0;
      const wanted = blocks(text);
      wanted.forEach((one, index) => {
        const is = JSON.stringify(one);
        if (drawn[index] === is) return;
        drawn[index] = is;
        const made = block(one);
        if (node.children[index]) node.children[index].replaceWith(made);
        else node.append(made);
      });
      drawn.length = wanted.length;
      while (node.children.length > wanted.length) node.lastChild.remove();
    }
    return {
      more(now) { text = now; frame ||= requestAnimationFrame(() => follow(draw)); },
      end() { cancelAnimationFrame(frame); draw(); },
    };
  }

  // Stays at the end of the conversation, unless its reader has scrolled away from it.
  function follow(change) {
    const near = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
    change();
    if (near) main.scrollTop = main.scrollHeight;
  }

  function show(node, text) {
    node.textContent = text;
    node.hidden = !text;
  }

  function add(template) {
    const turn = find(template).content.firstElementChild.cloneNode(true);
    log.append(turn);
    return turn;
  }

  // ── A question and its answer ────────────────────────────────────────────────────────────────────────────────────

  function setRunning(controller) {
    running = controller;
    const focused = document.activeElement;
    find("stop").hidden = !running;
    find("send").hidden = Boolean(running);
    if (focused === find("send") || focused === find("stop")) question.focus();
  }

  async function ask(text) {
    find("welcome").hidden = true;
    const asked = [...messages, { role: "user", content: text }];
    const body = { model: model.value, messages: asked, stream: true };
    if (find("temperature").value) body.temperature = Number(find("temperature").value);
    if (find("max-tokens").value) body.max_tokens = Number(find("max-tokens").value);
    add("asked").querySelector(".text").append(element("p", text));
    const turn = add("answered");
    const paint = painter(turn.querySelector(".text"));
    main.scrollTop = main.scrollHeight;
    const controller = new AbortController();
    setRunning(controller);
    let answer = "", id = "", finish = "", fault = "";
    try {
      for await (const event of events(await api("v1/chat/completions", body, controller.signal))) {
        const [choice] = event.choices ?? [];
        id = event.id ?? id;
        finish = choice?.finish_reason ?? finish;
        answer += choice?.delta?.content ?? "";
        paint.more(answer);
      }
    } catch (error) {
      fault = controller.signal.aborted ? "" : error.message;
    }
    if (!turn.isConnected) return; // a new conversation was begun meanwhile
    setRunning(null);
    const stopped = controller.signal.aborted;
    if (!fault && !stopped && !answer.trim()) fault = "the model answered nothing";
    follow(() => {
      paint.end();
      turn.setAttribute("aria-busy", "false");
      show(turn.querySelector(".fault"), fault);
      show(turn.querySelector(".note"), stopped ? "Stopped." : finish === "length" ? "Cut at the limit of tokens." : "");
      if (answer.trim()) {
        messages = [...asked, { role: "assistant", content: answer }];
        offerRating(turn, { messages: asked, answer, completion_id: id || undefined, model: body.model });
      } else if (!question.value) {
        question.value = text; // to send again: it is no part of the conversation
      }
    });
  }

  function offerRating(turn, rated) {
    const why = turn.querySelector(".why");
    const told = turn.querySelector(".told");
    const buttons = [...turn.querySelectorAll(".rate button")];
    let rating = "";

    async function send(remarks) {
      told.textContent = "";
      try {
        await api("v1/feedback", { ...rated, rating, ...remarks });
        told.textContent = remarks ? "Kept with your remarks." : "Kept.";
        return true;
      } catch (error) {
        told.textContent = `Not kept: ${error.message}`;
        return false;
      }
    }

    for (const button of buttons) {
      button.addEventListener("click", async () => {
        rating = button.value;
        if (!(await send())) return;
        for (const one of buttons) one.setAttribute("aria-pressed", String(one === button));
        why.hidden = false;
        why.querySelector("span").textContent = rating === "up" ? "What is good about it? (optional)" : "What is wrong with it? (optional)";
        why.querySelector(".better").hidden = rating === "up";
        why.elements.text.focus();
        why.scrollIntoView({ block: "nearest" });
      });
    }
    why.addEventListener("submit", async (event) => {
      event.preventDefault();
      const better = rating === "down" ? why.elements.better.value.trim() : "";
      why.hidden = await send({ text: why.elements.text.value.trim(), ...(better && { better }) });
    });
    turn.querySelector(".rate").hidden = false;
  }

  // ── Keys and buttons ─────────────────────────────────────────────────────────────────────────────────────────────

  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value;
    if (!text.trim() || running) return;
    question.value = "";
    ask(text);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("ask").requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  find("stop").addEventListener("click", () => running?.abort());
  find("new").addEventListener("click", () => {
    running?.abort();
    setRunning(null);
    messages = [];
    log.replaceChildren();
    find("welcome").hidden = false;
    question.focus();
  });
  loadModels();
})();
