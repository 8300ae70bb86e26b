// The model runs here, so that the page stays responsive. Messages in: load, ask, read, stop, reset.

import { Chat } from "./chat.js";
import { configure, EdgeModel, UserError } from "./edge.js";

let chat = null;

const say = (type, content = {}) => postMessage({ type, ...content });

const measure = () => ({ seen: chat.state.seen, bytes: chat.state.bytes });

const onRead = (done, total, seconds) => say("reading", { done, total, rate: done / seconds, ...measure() });

async function load({ base, threads }) {
  configure(threads);
  const model = await EdgeModel.load(base, (what, loaded, total) => say("loading", { what, loaded, total }));
  chat = await Chat.load(model, base);
  say("ready", { source: model.facts.source, precision: model.facts.precision, threads, ...measure() });
}

async function ask({ question, temperature, limit }) {
  let began = null;
  let tokens = 0;
  const onText = (text) => {
    began ??= performance.now();
    const rate = tokens ? tokens / ((performance.now() - began) / 1000) : 0;
    tokens += 1;
    say("text", { text, rate, ...measure() });
  };
  const count = await chat.answer(question, { temperature, limit, onRead, onText });
  say("answered", { count, stopped: chat.stopped, ...measure() });
}

async function read({ text }) {
  await chat.readDocument(text, onRead);
  say("read", { stopped: chat.stopped, ...measure() });
}

const actions = { load, ask, read, stop: () => chat?.stop(), reset: () => (chat.reset(), say("reset", measure())) };

onmessage = async ({ data }) => {
  try {
    await actions[data.type](data);
  } catch (error) {
    say("error", { message: error instanceof UserError ? error.message : `unexpected: ${error.message ?? error}` });
  }
};
