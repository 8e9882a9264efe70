// Text to token ids and back, as gradmap_hub/runtime/prompting.py does it for every other way to run a model.

import { Template } from "./vendor/jinja.js";
import { Tokenizer } from "./vendor/tokenizers.mjs";

import { Problem } from "./download.js";

export class TextCodec {
  /**
   * @param {Object} tokenizer The content of tokenizer.json.
   * @param {{chat_template: string | null, special_tokens: Object, end_ids: number[]}} facts From compare.json.
   */
  constructor(tokenizer, facts) {
    try {
      this.tokenizer = new Tokenizer(tokenizer, { clean_up_tokenization_spaces: false });
    } catch (error) {
      throw new Problem(`tokenizer.json could not be read: ${error.message}`);
    }
    this.facts = facts;
    this.ends = new Set(facts.end_ids);
  }

  /** The ids of a prompt as one user message, or as plain text if the model has no chat template. */
  encode(prompt) {
    const template = this.facts.chat_template;
    const text = template === null ? prompt : this.render(template, [{ role: "user", content: prompt }]);
    // A template has already written the special tokens.
    const { ids } = this.tokenizer.encode(text, { add_special_tokens: template === null });
    if (ids.length === 0) throw new Problem("This prompt has no tokens.");
    return ids;
  }

  render(template, messages) {
    try {
      return new Template(template).render({
        messages, add_generation_prompt: true, tools: null, documents: null, ...this.facts.special_tokens,
      });
    } catch (error) {
      throw new Problem(`The model's chat template failed: ${error.message}`);
    }
  }

  /** The text of an answer; `before` while its last character is not complete. */
  decode(ids, before) {
    const text = this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
    return text.endsWith("\uFFFD") ? before : text;
  }
}
