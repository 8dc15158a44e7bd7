// One conversation with the model behind this page. All text goes in as textContent, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const MEMORY = "tunesmith-chat";
let turns = [];        // {role, content}: what was said
let model = null;
let running = null;    // AbortController while an answer is being written

function remember() {
  const fields = { system: $("system").value, temperature: $("temperature").value, tokens: $("tokens").value };
  try { sessionStorage.setItem(MEMORY, JSON.stringify({ model, turns, fields })); } catch { /* storage is off */ }
}

function recall(settings) {
  $("system").value = settings.system;
  $("temperature").value = settings.temperature;
  let kept = null;
  try { kept = JSON.parse(sessionStorage.getItem(MEMORY)); } catch { /* storage is off */ }
  if (!kept || kept.model !== settings.model) return;
  turns = kept.turns;
  for (const [name, value] of Object.entries(kept.fields)) $(name).value = value;
  for (const turn of turns) show(turn.role, turn.content);
}

function show(role, text) {
  if (!$("turns").querySelector(".turn")) $("turns").replaceChildren();
  const turn = document.createElement("div");
  turn.className = "turn " + role;
  const who = document.createElement("div");
  who.className = "who";
  who.textContent = { user: "You", assistant: model, error: "Not answered" }[role];
  const body = document.createElement("div");
  body.className = "text";
  body.dir = "auto";
  body.textContent = text;
  turn.append(who, body);
  $("turns").append(turn);
  scrollDown(true);
  return { turn, body };
}

function scrollDown(always) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function showEmpty() {
  const note = document.createElement("div");
  note.className = "empty";
  note.textContent = "Nothing has been said yet.";
  $("turns").replaceChildren(note);
}

function setRunning(controller) {
  running = controller;
  $("send").classList.toggle("hidden", Boolean(controller));
  $("stop").classList.toggle("hidden", !controller);
}

function body() {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  const asked = { model, messages, stream: true, stream_options: { include_usage: true } };
  if ($("temperature").value !== "") asked.temperature = Number($("temperature").value);
  if ($("tokens").value !== "") asked.max_tokens = Number($("tokens").value);
  return asked;
}

// The JSON objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(text) {
  const mine = turns;    // "Clear" puts a new list in its place
  turns.push({ role: "user", content: text });
  const question = show("user", text);
  const answer = show("assistant", "");
  answer.turn.classList.add("writing");
  const controller = new AbortController();
  setRunning(controller);
  $("speed").textContent = "";
  let said = "", trouble = null;
  const began = performance.now();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body()),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta.content;
      if (piece) {
        said += piece;
        answer.body.textContent = said;
        scrollDown(false);
      }
      if (chunk.usage) {
        const seconds = (performance.now() - began) / 1000;
        const count = chunk.usage.completion_tokens;
        $("speed").textContent = `${count} tokens, ${(count / seconds).toFixed(1)} a second`;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") trouble = error.message;
  }
  answer.turn.classList.remove("writing");
  setRunning(null);
  if (turns === mine) finish(said, trouble, question, answer, text);
}

// What was written until an answer was stopped is the answer; a question without any is forgotten.
function finish(said, trouble, question, answer, text) {
  if (said) {
    turns.push({ role: "assistant", content: said });
  } else {
    turns.pop();
    answer.turn.remove();
    question.turn.remove();
    if (!$("question").value) $("question").value = text;
    resize();
    if (!trouble) trouble = "There was no answer; the question is back in its field.";
  }
  if (trouble) show("error", trouble);
  remember();
  $("question").focus();
}

function resize() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = field.scrollHeight + 2 + "px";
}

function clear() {
  if (running) running.abort();
  turns = [];
  showEmpty();
  $("speed").textContent = "";
  remember();
  $("question").focus();
}

async function start() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("question").value.trim();
    if (!text || running || model === null) return;
    for (const error of document.querySelectorAll(".turn.error")) error.remove();
    $("question").value = "";
    resize();
    ask(text);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  $("question").addEventListener("input", resize);
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", clear);
  for (const name of ["system", "temperature", "tokens"]) $(name).addEventListener("change", remember);
  showEmpty();
  try {
    const settings = await (await fetch("/settings")).json();
    model = settings.model;
    $("model").textContent = model;
    document.title = `Chat with ${model}`;
    recall(settings);
  } catch (error) {
    show("error", `The server does not answer: ${error.message}`);
  }
}

start();
