"use strict";
// The drawing scrolls by itself; this adds buttons that change its scale, and dragging with a mouse.
for (const frame of document.querySelectorAll(".frame")) {
  const svg = frame.querySelector("svg"), bar = document.createElement("div");
  const width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
  let scale = 1;
  const zoom = (wanted, x, y) => {
    const old = scale;
    scale = Math.min(4, Math.max(0.02, wanted));
    svg.style.width = width * scale + "px";
    svg.style.height = height * scale + "px";
    frame.scrollLeft = (frame.scrollLeft + x) * scale / old - x;
    frame.scrollTop = (frame.scrollTop + y) * scale / old - y;
  };
  const step = (factor) => () => zoom(scale * factor, frame.clientWidth / 2, frame.clientHeight / 2);
  const fit = () => zoom(Math.min(1, (frame.clientWidth - 2) / width, (frame.clientHeight - 2) / height), 0, 0);
  for (const [text, label, act] of [["+", "Zoom in", step(1.4)], ["\u2212", "Zoom out", step(1 / 1.4)],
                                    ["Fit", "Show the whole drawing", fit], ["1:1", "Natural size", () => zoom(1, 0, 0)]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", label);
    button.addEventListener("click", act);
    bar.append(button);
  }
  bar.className = "zoom";
  frame.before(bar);
  frame.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const box = frame.getBoundingClientRect();
    zoom(scale * Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
  }, {passive: false});
  frame.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    const left = frame.scrollLeft + event.clientX, top = frame.scrollTop + event.clientY;
    const move = (next) => { frame.scrollLeft = left - next.clientX; frame.scrollTop = top - next.clientY; };
    frame.classList.add("grabbed");
    frame.setPointerCapture(event.pointerId);
    frame.addEventListener("pointermove", move);
    frame.addEventListener("lostpointercapture", () => {
      frame.removeEventListener("pointermove", move);
      frame.classList.remove("grabbed");
    }, {once: true});
  });
}
