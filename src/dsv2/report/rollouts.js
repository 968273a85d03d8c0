"use strict";
// Filters and sorts what the page holds already; without it the page shows every group as it was drawn.
const get = (id) => document.getElementById(id);
const list = get("groups");
const groups = [...list.children];
const answers = groups.map((group) => [...group.querySelectorAll(".answer")]);
const number = (element, name) => (element.dataset[name] === "" ? -Infinity : Number(element.dataset[name]));
const orders = {
  drawn: (element) => Number(element.dataset.place),
  highest: (element) => -number(element, "reward"),
  lowest: (element) => (element.dataset.reward === "" ? Infinity : number(element, "reward")),
  longest: (element) => -number(element, "tokens"),
};
const sorted = (elements, order) => [...elements].sort((a, b) => orders[order](a) - orders[order](b) || a.dataset.place - b.dataset.place);

function show() {
  const order = get("order").value, step = get("step").value, words = get("find").value.toLowerCase();
  const shown = groups.filter((group) => {
    const kept = (!step || group.dataset.step === step) && (!get("differ").checked || group.dataset.differ === "1")
      && (!words || group.textContent.toLowerCase().includes(words));
    group.hidden = !kept;
    return kept;
  });
  groups.forEach((group, i) => group.append(...sorted(answers[i], order)));
  list.append(...sorted(groups, order));
  get("shown").textContent = `${shown.length} of ${groups.length} groups`;
}

for (const id of ["step", "order", "differ", "find"]) get(id).addEventListener("input", show);
get("controls").hidden = false;
show();
