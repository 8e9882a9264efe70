// What this device can hold and compute on.

const GIGABYTE = 1e9;
// The share of a device's memory that the files of both models may take: the browser holds them about twice while it
// loads them, and needs memory for itself.
const SHARE = 1 / 4;
// Gigabytes assumed if the browser does not report its memory; most phones and computers have this much or more.
const ASSUMED_PHONE = 4;
const ASSUMED_COMPUTER = 8;

const isPhone = () => navigator.userAgentData?.mobile ?? /Android|iPhone|iPad|Mobile/.test(navigator.userAgent);

/** Bytes that the files of all loaded models may take together; at most `most`. */
export function roomFor(most, gigabytes = navigator.deviceMemory) {
  const memory = gigabytes ?? (isPhone() ? ASSUMED_PHONE : ASSUMED_COMPUTER);
  return Math.min(most, memory * SHARE * GIGABYTE);
}

/**
 * What to offer first: both models in the first precision that fits, else the pruned one alone.
 * @param precisions Those of compare.json.
 * @param {number} room Bytes.
 * @returns {{precision: string, sides: string[]} | null} null: nothing fits.
 */
export function offer(precisions, room) {
  const both = precisions.find(({ original, pruned }) => original.bytes + pruned.bytes <= room);
  if (both) return { precision: both.name, sides: ["original", "pruned"] };
  const alone = precisions.find(({ pruned }) => pruned.bytes <= room);
  return alone ? { precision: alone.name, sides: ["pruned"] } : null;
}

/** What WebGPU computes on: "hardware"; "software", which is slower than WebAssembly; or "none". */
export async function findGpu() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    if (!adapter) return "none";
    const info = adapter.info ?? {};
    const software = info.isFallbackAdapter ?? adapter.isFallbackAdapter ?? false;
    return software || /swiftshader|llvmpipe|basic render/i.test(`${info.architecture} ${info.description}`)
      ? "software"
      : "hardware";
  } catch {
    return "none";
  }
}

/** Threads of ONNX Runtime: 1 where the page does not have the headers that allow shared memory. */
export function threadCount() {
  const cores = navigator.hardwareConcurrency || 1;
  return self.crossOriginIsolated ? Math.max(1, cores <= 4 ? cores : Math.min(8, Math.floor(cores / 2))) : 1;
}
