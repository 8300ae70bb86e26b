// A conversation with one state: only what is new is read, since the state holds the rest.

import { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import { fetchJson, pick, UserError } from "./edge.js";

const UNFINISHED = "\ufffd"; // the first bytes of a letter whose last ones are still to come

export class Chat {
  static async load(model, base) {
    return new Chat(model, new Tokenizer(await fetchJson(new URL("tokenizer.json", base)), {}));
  }

  constructor(model, tokenizer) {
    this.model = model;
    this.tokenizer = tokenizer;
    this.template = model.facts.chat_template ? new Template(model.facts.chat_template) : null;
    this.reset();
  }

  reset() {
    this.state = this.model.start();
    this.messages = [];
    this.documents = "";
    this.fed = ""; // the text that the state has read
    this.stopped = false;
  }

  stop() {
    this.stopped = true;
  }

  /** Reads a document into the state; the next question comes after it. */
  async readDocument(text, onRead) {
    this.documents += (this.documents ? "\n\n" : "") + text.trim();
    if (!this.documents) throw new UserError("the document is empty");
    const whole = this.render([...this.messages, { role: "user", content: this.documents }], false);
    const begin = whole.lastIndexOf(this.documents);
    await this.feed(whole.slice(0, begin + this.documents.length), onRead);
    if (this.stopped) this.documents = this.fed.slice(begin); // a question is about what was read
  }

  /** Answers; `onText(piece)` hears it. Ends at the end of the text, after `limit` tokens, or when stopped. */
  async answer(question, { temperature, limit, onRead, onText }) {
    const content = (this.documents ? `${this.documents}\n\n` : "") + question.trim();
    this.documents = "";
    this.messages.push({ role: "user", content });
    let logits = await this.feed(this.render(this.messages, true), onRead);
    const ids = [];
    let said = "";
    while (!this.stopped && ids.length < limit) {
      const token = pick(logits, temperature);
      if (this.model.facts.eos.includes(token)) break;
      ids.push(token);
      const text = this.decode(ids);
      if (!text.endsWith(UNFINISHED)) {
        onText(text.slice(said.length));
        said = text;
      }
      logits = await this.model.read(this.state, [token]);
      await new Promise((done) => setTimeout(done)); // so that a stop is heard
    }
    this.fed += said;
    this.messages.push({ role: "assistant", content: said });
    return ids.length;
  }

  /** Reads what of `text` the state has not read; from the start where it was another text. */
  async feed(text, onRead = () => {}) {
    this.stopped = false;
    if (!text.startsWith(this.fed)) {
      this.state = this.model.start();
      this.fed = "";
    }
    const ids = this.encode(text.slice(this.fed.length));
    if (!ids.length) throw new UserError("there is nothing to read");
    const began = performance.now();
    const report = (done) => onRead(done, ids.length, (performance.now() - began) / 1000);
    let read = 0;
    const logits = await this.model.read(this.state, ids, async (done) => {
      report((read = done));
      await new Promise((next) => setTimeout(next));
      return !this.stopped;
    });
    this.fed = read === ids.length ? text : this.fed + this.decode(ids.slice(0, read), false);
    return logits;
  }

  render(messages, generate) {
    if (!this.template) return messages.map((message) => message.content).join("\n");
    return this.template.render({ messages, add_generation_prompt: generate, ...this.model.facts.special_tokens });
  }

  encode(text) {
    const ids = this.tokenizer.encode(text, { add_special_tokens: false }).ids;
    const { bos } = this.model.facts;
    return !this.template && !this.fed && bos !== null ? [bos, ...ids] : ids;
  }

  decode(ids, skip = true) {
    return this.tokenizer.decode(ids, { skip_special_tokens: skip, clean_up_tokenization_spaces: false });
  }
}
