// The statuses that the server tells, in the language of the page: English comes, and rules turn it into Chinese.
// Sentences that no rule knows stay English. The words are those of docs/chinese.md.
const CHINESE = [
  [/\bPARTLY TRAINED\b/, "部分训练"],
  [/\bUNTRAINED\b/, "未训练"],
  [/\bTRAINED\b/, "已训练"],
  [/\bUNFINISHED\b/, "未完成"],
  [/^DENSE\b/, "稠密"],
  [/^CALIBRATED\b/, "已校准"],
  [/no candidate is faster here/, "没有候选在此更快"],
  [/no plan stays within error ([\d.e-]+)/, "没有方案的误差不超过 $1"],
  [/dense attention is within that share of its time/, "稠密注意力已在该时间份额之内"],
  [/no plan gains a step/, "没有方案能缩短一步的时间"],
  [/([\d.]+) % of attention's time/, "注意力时间的 $1 %"],
  [/error (about )?([\d.e-]+)$/, (_, about, number) => `误差${about ? "约" : ""} ${number}`],
  [/^calibrating: step (\d+) of (\d+)/, "校准：第 $1 / $2 步"],
  [/^calibrating: checking plan (\d+) of up to (\d+) on the whole model/, "校准：用整个模型检查方案 $1（最多 $2）"],
  [/^calibrating took ([\d.]+) s, which (\d+) steps? win back/, "校准用了 $1 秒，$2 步之后收回"],
  [/^measured ([\d-]+ [\d:]+) on (.+?), at/, "测于 $1，$2，"],
  [/^NOTHING RAN\b/, "没有运行"],
  [/([\d.]+) % of attention: covers the whole picture, saves nothing/, "注意力运算的 $1 %：覆盖整幅图像，没有节省"],
  [/([\d.]+) % of attention: computes more than dense/, "注意力运算的 $1 %：比稠密多"],
  [/([\d.]+) % of attention/, "注意力运算的 $1 %"],
  [/(\d+) of (\d+) sites?/, "$1 / $2 个位置"],
  [/([\d.]+) s a step, dense about ([\d.]+)/, "每步 $1 秒，稠密约 $2"],
  [/([\d.]+) s a step, dense ([\d.]+)/, "每步 $1 秒，稠密 $2"],
  [/([\d.]+) s a step/, "每步 $1 秒"],
  [/: costs more than dense at this size/, "：在此大小比稠密慢"],
  [/([\d,]+) tokens: below ([\d,]+) (\w+) attention was never faster here \(min_tokens 0 runs it all the same\)/,
    "$1 个 token：不足 $2 时 $3 注意力在本机上从未更快（min_tokens 设为 0 则照样运行）"],
  [/([\d.]+) % of the calls, the others dense/, "$1 % 的调用，其余为稠密"],
  [/cancelled after (\d+) of (\d+) (updates?|samples?), run again to go on/, "已取消：完成 $1 / $2，再次运行即可继续"],
  [/cancelled, run again to go on/, "已取消，再次运行即可继续"],
  [/update (\d+) of (\d+)/, "更新 $1 / $2"],
  [/about ([\d.]+) (s|min|h) left/, (_, number, unit) => `约剩 ${number} ${{ s: "秒", min: "分钟", h: "小时" }[unit]}`],
  [/([\d.]+) s per update/, "每次更新 $1 秒"],
  [/^sampled: /, "采样："],
  [/^planned:$/, "方案："],
  [/(\d+) text tokens?/, "$1 个文本 token"],
  [/(\d+ x \d+) pixels/, "$1 像素"],
];
const LAST_RUN = { en: "last run", zh: "上次运行" };

export const inWordsOf = (language, text) =>
  language.startsWith("zh")
    ? text
        .split("\n")
        .map((line) => CHINESE.reduce((words, [from, to]) => words.replace(from, to), line))
        .join("\n")
    : text;

export const lastRun = (language, date) => `${LAST_RUN[language.startsWith("zh") ? "zh" : "en"]} ${date}`;
