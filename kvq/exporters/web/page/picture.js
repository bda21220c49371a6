// Images as the model takes them, and back onto a canvas.

// Pixels a side at most, of an image at its own size: beyond, a browser on one thread keeps people waiting.
export const LARGEST = 512;

// How an image is scaled and cut: to the size the model was trained on, or at its own size to multiples of the downsampling.
function fit(width, height, model, own) {
  const scale = own ? Math.min(1, LARGEST / Math.max(width, height)) : model.crop / Math.min(width, height);
  const whole = (side) => Math.floor(Math.max(1, Math.round(side * scale)) / model.downsampling) * model.downsampling;
  return { scale, width: own ? whole(width) : model.crop, height: own ? whole(height) : model.crop };
}

// A file as {width, height, pixels, note}: pixels are uint8, rows of pixels of channels.
export async function read(file, model, own) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "That"} is not an image this browser can read.`);
  }
  const { scale, width, height } = fit(bitmap.width, bitmap.height, model, own);
  if (!width || !height) throw new Error(`An image must have at least ${model.downsampling} pixels a side.`);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const [wide, high] = [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  context.drawImage(bitmap, -Math.floor((wide - width) / 2), -Math.floor((high - height) / 2), wide, high);
  const changed = [scale !== 1 && "scaled", (wide !== width || high !== height) && "cut"].filter(Boolean).join(" and ");
  const note = `${width} × ${height}` + (changed && `, ${changed} from ${bitmap.width} × ${bitmap.height}`);
  bitmap.close();
  return { width, height, pixels: channelsOf(context.getImageData(0, 0, width, height).data, model.channels), note };
}

function channelsOf(rgba, channels) {
  const pixels = new Uint8Array((rgba.length / 4) * channels);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += channels) {
    const [red, green, blue] = [rgba[from], rgba[from + 1], rgba[from + 2]];
    // Grey as Pillow computes it.
    if (channels === 1) pixels[to] = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16;
    else pixels.set([red, green, blue], to);
  }
  return pixels;
}

export function draw(canvas, { width, height, pixels }) {
  const channels = pixels.length / (width * height);
  const image = new ImageData(width, height);
  for (let from = 0, to = 0; to < image.data.length; from += channels, to += 4) {
    const [red, green, blue] = channels === 1 ? [pixels[from], pixels[from], pixels[from]] : pixels.subarray(from, from + 3);
    image.data.set([red, green, blue, 255], to);
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Peak signal-to-noise ratio of two arrays of uint8, in dB.
export function psnr(first, second) {
  let sum = 0;
  for (let index = 0; index < first.length; index++) sum += (first[index] - second[index]) ** 2;
  return 10 * Math.log10((255 ** 2 * first.length) / sum);
}
