// Comfort only: a switch between light and dark, tooltips that show at once, and open folds on paper.
(function () {
  "use strict";
  var root = document.documentElement;
  var dark = function () {
    return root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  var button = document.createElement("button");
  button.type = "button";
  var name = function () {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", "Switch to " + (dark() ? "light" : "dark") + " colours");
  };
  button.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  name();
  document.querySelector("header").append(button);

  var tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  document.querySelectorAll(".tip > title").forEach(function (title) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  });
  var show = function (event) {
    var mark = event.target.closest ? event.target.closest(".tip") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    var x = Math.min(event.clientX + 12, root.clientWidth - tip.offsetWidth - 6);
    var y = event.clientY - tip.offsetHeight - 12;
    if (y < 4) y = event.clientY + 18;
    tip.style.left = Math.max(4, x) + scrollX + "px";
    tip.style.top = y + scrollY + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape") tip.hidden = true;
  });

  addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not([open])").forEach(function (fold) {
      fold.open = true;
      fold.dataset.printed = "";
    });
  });
  addEventListener("afterprint", function () {
    document.querySelectorAll("details[data-printed]").forEach(function (fold) {
      fold.open = false;
      delete fold.dataset.printed;
    });
  });
})();
