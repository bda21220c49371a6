// Outlines around a token's place, in every picture at once.

// Puts the outline `name` around a place of `rows` by `columns`, counted row by row; null takes it away.
export function outline(frames, name, place, rows, columns) {
  for (const frame of frames) {
    let box = frame.querySelector(`.${name}`);
    if (!box) {
      box = document.createElement("div");
      box.className = name;
      frame.append(box);
    }
    box.hidden = place === null;
    if (place === null) continue;
    box.style.left = `${(100 * (place % columns)) / columns}%`;
    box.style.top = `${(100 * Math.floor(place / columns)) / rows}%`;
    box.style.width = `${100 / columns}%`;
    box.style.height = `${100 / rows}%`;
  }
}

// The place that a pointer is over.
export function placeUnder(event, frame, rows, columns) {
  const box = frame.getBoundingClientRect();
  const along = (position, length, count) => Math.min(count - 1, Math.max(0, Math.floor((position / length) * count)));
  return along(event.clientY - box.top, box.height, rows) * columns + along(event.clientX - box.left, box.width, columns);
}
