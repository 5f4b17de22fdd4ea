// A page opened from a disk may not start a worker. Its search then runs in a hidden frame instead.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.append(frame)
    this.inside = frame.contentWindow
    this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
    const script = this.inside.document.createElement("script")
    script.src = url
    this.ready = new Promise(resolve => script.addEventListener("load", resolve))
    this.inside.document.head.append(script)
  }

  async postMessage(data) {
    await this.ready
    this.inside.dispatchEvent(new MessageEvent("message", { data }))
  }
}
