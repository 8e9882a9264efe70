// Loads a model folder with transformers.js, as a user of it does, and prints what it generates as JSON.
//
//     node generate.mjs ROOT NAME REQUEST
//
// ROOT/NAME is the folder. REQUEST, JSON: dtypes (null: the default), ids (prompt) and tokens (how many to generate),
// and chat: messages to which the default dtype answers.
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env, pipeline } from "@huggingface/transformers";

const [root, name, request] = process.argv.slice(2);
const { dtypes, ids, tokens, chat } = JSON.parse(request);
env.localModelPath = root;
env.allowRemoteModels = false;

const found = { tokens: {}, chat: null };
const row = (values) => new Tensor("int64", BigInt64Array.from(values.map(BigInt)), [1, values.length]);
for (const dtype of dtypes) {
  const model = await AutoModelForCausalLM.from_pretrained(name, dtype === null ? {} : { dtype });
  const output = await model.generate({
    input_ids: row(ids),
    attention_mask: row(ids.map(() => 1)),
    max_new_tokens: tokens,
    do_sample: false,
  });
  found.tokens[dtype ?? "default"] = output.tolist()[0].slice(ids.length).map(Number);
  await model.dispose();
}
if (chat) {
  const generator = await pipeline("text-generation", name);
  const [answer] = await generator(chat, { max_new_tokens: tokens, do_sample: false });
  found.chat = answer.generated_text.at(-1).content;
}
console.log(JSON.stringify(found));
