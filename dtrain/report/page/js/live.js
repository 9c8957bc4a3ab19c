// A served page asks for what is new, once a second; an unchanged answer is a word, not the runs again.

const live = {
  tag: null,

  start(update) {
    const ask = async () => {
      if (!document.hidden) await this.ask(update);
      setTimeout(ask, 1000);
    };
    setTimeout(ask, 1000);
  },

  async ask(update) {
    try {
      const answer = await fetch("data.json", { cache: "no-store", headers: this.tag ? { "If-None-Match": this.tag } : {} });
      if (answer.status === 200) {
        const data = await answer.json();
        this.tag = answer.headers.get("ETag");
        update(data);
      } else if (answer.status !== 304) throw new Error(String(answer.status));
      this.say(`live; looked at ${moment(Date.now() / 1000).slice(11)}`);
    } catch {
      this.say("the server does not answer; trying again");
    }
  },

  // The time is for the eye alone: a reader of the screen is told when the words change.
  say(words) {
    const [plain, time] = words.split("; looked at ");
    const spot = byId("live");
    if (spot.firstChild?.textContent !== plain) spot.replaceChildren(el("span", {}, plain), el("span", { "aria-hidden": "true", class: "time" }));
    spot.lastChild.textContent = time ? `, ${time}` : "";
  },
};
