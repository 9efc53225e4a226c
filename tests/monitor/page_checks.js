// What the browser tests ask a page about itself: what has no name, and what is hard to read.
({
  nameless() {
    const told = (id) => document.getElementById(id)?.textContent.trim();
    return [...document.querySelectorAll("button,select,input,textarea,summary,meter,progress,dialog,.figure,[tabindex]")]
      .filter((e) => {
        if (e.getAttribute("aria-label") || (e.labels && [...e.labels].some((label) => label.textContent.trim()))) return false;
        if ((e.getAttribute("aria-labelledby") || "").split(" ").some((id) => id && told(id))) return false;
        return !(/BUTTON|SUMMARY/.test(e.tagName) && e.textContent.trim());
      })
      .map((e) => e.outerHTML.slice(0, 120));
  },
  // Text with a contrast below 4.5 to what is behind it, as WCAG 2 counts it; what is disabled does not count.
  faint() {
    const parse = (text) => { const part = text.match(/[\d.]+/g).map(Number); return { rgb: part.slice(0, 3), a: part[3] ?? 1 }; };
    const over = (top, under) => top.rgb.map((value, i) => value * top.a + under[i] * (1 - top.a));
    const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(rgb[i]), 0);
    const behind = (element) => {
      const layers = [];
      for (let at = element; at; at = at.parentElement) {
        layers.push(parse(getComputedStyle(at).backgroundColor));
        if (layers.at(-1).a === 1) break;
      }
      const canvas = matchMedia("(prefers-color-scheme:dark)").matches ? [18, 18, 18] : [255, 255, 255];
      return layers.reverse().reduce((under, layer) => over(layer, under), canvas);
    };
    const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let count = 0;
    while (walker.nextNode()) {
      const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement, style = getComputedStyle(e);
      if (!text || !e.getClientRects().length || style.visibility === "hidden") continue;
      if (e.closest("script,style,option,:disabled,progress,meter,noscript")) continue;
      const drawn = e instanceof SVGElement, ink = parse(drawn ? style.fill : style.color);
      if (drawn) ink.a *= Number(style.fillOpacity);
      for (let at = e; at; at = at.parentElement) ink.a *= Number(getComputedStyle(at).opacity);
      const ground = behind(drawn ? e.closest(".figure") : e), [one, other] = [light(over(ink, ground)), light(ground)];
      const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
      count += 1;
      if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)} (${e.tagName} ${e.getAttribute("class") || ""})`);
    }
    return { count, found };
  },
})
