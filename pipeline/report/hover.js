// Shows data-tip of what lies under the pointer or was tapped, beside it and inside the window.
const box = document.getElementById("hover");
function show(event) {
  const found = event.target.closest?.("[data-tip]");
  box.hidden = !found;
  if (!found) return;
  box.textContent = found.dataset.tip;
  const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - box.offsetWidth - 8);
  const above = event.clientY - box.offsetHeight - 12;
  const top = above < 8 ? event.clientY + 20 : above;
  box.style.transform = `translate(${Math.max(8, left)}px, ${top}px)`;
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", () => { box.hidden = true; }, { passive: true });
