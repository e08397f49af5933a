"use strict";
document.documentElement.classList.add("js");

// The slider of a photo sets how much of its heatmaps is seen.
for (const slider of document.querySelectorAll(".choices input")) {
  const show = () => {
    slider.closest(".photo").style.setProperty("--opacity", slider.value / 100);
    slider.parentElement.querySelector("output").value = slider.value + " %";
  };
  slider.addEventListener("input", show);
  show(); // a browser that comes back to the page may have kept another value
}

// The menu of a photo says by which method its heatmaps are made.
for (const menu of document.querySelectorAll(".choices select")) {
  const show = () => {
    for (const part of menu.closest(".photo").querySelectorAll("[data-method]")) {
      part.hidden = part.dataset.method !== menu.value;
    }
  };
  menu.addEventListener("change", show);
  show();
}

// Which channel the pointer is on; the numbers beside the rows say the same to everybody.
for (const sheet of document.querySelectorAll(".numbered img")) {
  const said = sheet.closest("figure").querySelector(".which");
  const { columns, rows, count } = sheet.dataset;
  sheet.addEventListener("pointermove", (event) => {
    const box = sheet.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const channel = row * columns + column;
    said.value = channel >= 0 && channel < count ? "channel " + channel : "";
  });
  sheet.addEventListener("pointerleave", () => { said.value = ""; });
}
