// Fetches large files once: with progress, and kept by the browser for the next visit.

const STORE = "gradmap-models";

/** A failure in words that the page shows. */
export class Problem extends Error {}

/** The address under which a file is kept. `version` changes with the content. */
const keyOf = (url, version) => (version ? `${url}?version=${version}` : url);

async function store() {
  try {
    return await caches.open(STORE);
  } catch {
    return null; // not over plain http, and not in every private window
  }
}

/** Whether all `files`, {url, version}, are in the browser's store. */
export async function kept(files) {
  const place = await store();
  if (!place) return false;
  const found = await Promise.all(files.map(({ url, version }) => place.match(keyOf(url, version))));
  return found.every(Boolean);
}

/** Forget all files that this page has stored. */
export const forget = () => caches.delete(STORE);

/**
 * The bytes of a file.
 * @param {{url: string, version?: string, bytes?: number}} file `bytes`: the expected size, for the progress.
 * @param {string} name What messages call it.
 * @param {(received: number) => void} received Told the number of bytes so far.
 * @param {AbortSignal} signal Ends the download.
 * @returns {Promise<Uint8Array>}
 */
export async function download(file, name, received, signal) {
  const place = await store();
  const key = keyOf(file.url, file.version);
  const stored = place && (await place.match(key));
  if (stored) {
    const bytes = new Uint8Array(await stored.arrayBuffer());
    received(bytes.length);
    return bytes;
  }
  let answer;
  try {
    answer = await fetch(file.url, { signal, credentials: "same-origin" });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Problem(`${name} could not be downloaded: ${new URL(file.url).host} cannot be reached.`);
  }
  if (!answer.ok) throw new Problem(`${name} could not be downloaded: ${refusal(answer.status)}.`);
  const bytes = await whole(answer, file.bytes, name, received, signal);
  if (place) {
    try {
      await place.put(key, new Response(bytes));
    } catch {
      // No room in the browser's store: the next visit downloads it again.
    }
  }
  return bytes;
}

function refusal(status) {
  if (status === 401 || status === 403) return `access was refused (${status}); the model is private or gated`;
  if (status === 404) return "it does not exist (404), or is private";
  return `the server answered ${status}`;
}

async function whole(answer, expected, name, received, signal) {
  const size = Number(answer.headers.get("content-length")) || expected || 0;
  let bytes = new Uint8Array(size);
  let length = 0;
  const reader = answer.body.getReader();
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Problem(`The download of ${name} broke off after ${length.toLocaleString("en")} bytes. Start it again.`);
    }
    if (part.done) break;
    if (length + part.value.length > bytes.length) {
      const larger = new Uint8Array(Math.max(2 * bytes.length, length + part.value.length));
      larger.set(bytes.subarray(0, length));
      bytes = larger;
    }
    bytes.set(part.value, length);
    length += part.value.length;
    received(length);
  }
  return length === bytes.length ? bytes : bytes.slice(0, length);
}
