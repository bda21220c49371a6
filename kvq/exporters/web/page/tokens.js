// The grid of tokens: what colour a code has, how the grid is drawn, and which codes the palette offers.

// A palette of all codes up to here; of more, those that the picture uses most.
const PALETTE = 64;

export function colourOf(model, level, code) {
  return model.colours ? model.colours[level][code] : hashed(code);
}

export function explain(model) {
  return model.colours
    ? "Colours: codes that are alike have like colours (hue and lightness follow the first two principal axes of the codebook)."
    : "Colours: by a hash of the code, since there are too many; that two are alike means nothing.";
}

function hashed(code) {
  let bits = Math.imul(code + 1, 0x9e3779b1);
  bits = Math.imul(bits ^ (bits >>> 15), 0x85ebca6b) >>> 0;
  const [hue, lightness] = [(bits >>> 16) % 360, 0.38 + 0.3 * ((bits & 255) / 255)];
  const part = (shift) => {
    const place = (shift + hue / 30) % 12;
    const value = lightness - 0.55 * Math.min(lightness, 1 - lightness) * Math.max(-1, Math.min(place - 3, 9 - place, 1));
    return Math.round(255 * value).toString(16).padStart(2, "0");
  };
  return `#${part(0)}${part(8)}${part(4)}`;
}

// What can be read on a colour.
export function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

// `codes` of one level, row by row. Codes are written out where there is room.
export function drawTokens(canvas, model, level, codes, rows, columns) {
  const side = Math.max(4, Math.min(96, Math.floor(1024 / Math.max(rows, columns))));
  canvas.width = columns * side;
  canvas.height = rows * side;
  const context = canvas.getContext("2d");
  const size = Math.min(0.36 * side, (1.3 * side) / String(model.vocabulary - 1).length);
  context.font = `${size}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  codes.forEach((code, place) => {
    const [x, y] = [(place % columns) * side, Math.floor(place / columns) * side];
    context.fillStyle = colourOf(model, level, code);
    context.fillRect(x, y, side, side);
    if (side < 48) return;
    context.fillStyle = inkOn(context.fillStyle);
    context.fillText(code, x + side / 2, y + side / 2 + 0.04 * side);
  });
}

// Codes worth offering, and why those.
export function palette(model, codes) {
  if (model.vocabulary <= PALETTE) return { codes: Array.from({ length: model.vocabulary }, (_, code) => code), note: "All codes" };
  const counts = new Map();
  for (const code of codes) counts.set(code, (counts.get(code) ?? 0) + 1);
  const used = [...counts.keys()].sort((first, second) => counts.get(second) - counts.get(first) || first - second);
  const note = `The codes that the picture uses most, ${Math.min(used.length, PALETTE)} of ${model.vocabulary.toLocaleString("en")}`;
  return { codes: used.slice(0, PALETTE), note };
}
