/* page.c - the frame of report.html: head, style, script, escaping. One file that needs nothing else: no
 * network, no fonts, no libraries. The content security policy forbids everything but the style sheet and the
 * one script below (by their hashes) and data: images, so that no text from a model or a prompt can do
 * anything on the page even if an escape were missed.
 *
 * The script only draws heatmaps: it reads int16 cells from data-cells of each figure.map, draws them at the
 * screen's resolution on the scale of the current colour scheme, and names the cell under the pointer.
 * Without it, pictures and tables are there. */
#include <string.h>

#include "page.h"

static const char style[] =
    ":root{--bg:#f7f6f3;--panel:#fff;--ink:#1d2125;--muted:#626b74;--line:#e2dfd8;--soft:#efece6;"
    "--before:#8b8f94;--after:#0a6a9c;--good:#1b7047;--bad:#a8381c;--goodbg:#e4f1ea;--badbg:#f9e8e2;"
    "--ramp:linear-gradient(90deg,#084081,#2b7bba,#92c5de,#f7f7f5,#fabe8a,#de6533,#8f240c);"
    "color-scheme:light dark}\n"
    "@media screen and (prefers-color-scheme:dark){:root{--bg:#121517;--panel:#1a1e21;--ink:#e6e8e9;"
    "--muted:#99a2aa;--line:#2d3338;--soft:#23282c;--before:#868e95;--after:#58b2e4;--good:#6cc79a;"
    "--bad:#f08a6b;--goodbg:#17301f;--badbg:#3a1e16;--ramp:linear-gradient(90deg,#9ad4ff,#4a9ede,#235a86,"
    "#23282c,#8a4526,#e07a45,#ffc59b)}}\n"
    "*{box-sizing:border-box}\n"
    "html{-webkit-text-size-adjust:100%}\n"
    "body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,\"Segoe UI\","
    "Roboto,\"Helvetica Neue\",\"Noto Sans\",\"Liberation Sans\",sans-serif;"
    "font-variant-numeric:tabular-nums}\n"
    "main,header,footer{max-width:1120px;margin:0 auto;padding:0 28px}\n"
    "header{padding-top:52px;padding-bottom:8px}\n"
    ".eyebrow{margin:0 0 10px;color:var(--muted);font-size:13px;letter-spacing:.09em;"
    "text-transform:uppercase}\n"
    "h1{margin:0;font-size:34px;line-height:1.15;letter-spacing:-.015em;font-weight:650;"
    "overflow-wrap:anywhere}\n"
    ".facts{margin:10px 0 0;color:var(--muted)}\n"
    ".lede{margin:26px 0 0;max-width:46em;font-size:20px;line-height:1.5}\n"
    "section{margin-top:52px}\n"
    "h2{margin:0 0 6px;font-size:22px;letter-spacing:-.01em;font-weight:640}\n"
    "h3{margin:26px 0 8px;font-size:15px;font-weight:640}\n"
    ".note{margin:0 0 18px;max-width:48em;color:var(--muted);font-size:15px}\n"
    ".tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin-top:30px}\n"
    ".tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:16px 18px 14px}\n"
    ".tile .what{color:var(--muted);font-size:13.5px;line-height:1.35;min-height:2.7em}\n"
    ".tile .big{margin-top:6px;font-size:31px;line-height:1.1;font-weight:640;letter-spacing:-.02em;"
    "white-space:nowrap}\n"
    ".tile .was{font-size:17px;font-weight:500;color:var(--before);letter-spacing:0}\n"
    ".tile .ci{margin-top:6px;color:var(--muted);font-size:13px}\n"
    ".panel{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:20px 22px}\n"
    ".scroll{overflow-x:auto}\n"
    "table{border-collapse:collapse;width:100%;font-size:14px;line-height:1.4}\n"
    "th{color:var(--muted);font-weight:500;font-size:12.5px;text-align:right;vertical-align:bottom;padding:0 "
    "0 7px 16px;border-bottom:1px solid var(--line);white-space:nowrap}\n"
    "td{text-align:right;padding:6px 0 6px 16px;border-bottom:1px solid var(--soft);white-space:nowrap}\n"
    "tr:last-child td{border-bottom:0}\n"
    "th:first-child,td:first-child{padding-left:0;text-align:left}\n"
    "th.l,td.l{text-align:left}\n"
    "td.ci,span.ci{color:var(--muted);font-size:12.5px}\n"
    "td code{font-size:12.5px}\n"
    ".rates span.ci{display:inline-block;width:7.6em}\n"
    ".rates td{padding-top:4px;padding-bottom:4px}\n"
    ".rates td.pic{width:44%;padding-left:18px;padding-right:6px}\n"
    ".rates .group td{padding-top:16px;color:var(--muted);font-size:13px;border-bottom:1px solid "
    "var(--line)}\n"
    ".rates tr:first-child.group td{padding-top:2px}\n"
    ".rates svg{display:block;width:100%;height:30px;overflow:visible}\n"
    ".key{display:flex;flex-wrap:wrap;gap:6px 22px;margin:12px 0 0;color:var(--muted);font-size:13px}\n"
    ".key svg{width:34px;height:12px;vertical-align:-1px;margin-right:6px;overflow:visible}\n"
    ".two{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:18px}\n"
    ".tall{max-height:432px;overflow:auto;padding-top:0}\n"
    ".tall th{position:sticky;top:0;background:var(--panel);padding-top:18px}\n"
    ".side{align-items:start;display:grid;grid-template-columns:minmax(0,5fr) minmax(0,6fr);gap:18px}\n"
    ".one{display:grid;grid-template-columns:minmax(0,1fr);gap:18px}\n"
    ".cards{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:14px}\n"
    ".card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:15px 18px 13px}\n"
    ".card .ask{margin:0 0 10px;font-weight:600}\n"
    ".card .ask small{display:block;color:var(--muted);font-weight:500;font-size:12.5px}\n"
    ".card dl{margin:0;display:grid;grid-template-columns:64px minmax(0,1fr);gap:5px 10px;font-size:14.5px}\n"
    ".card dt{color:var(--muted);font-size:13px;padding-top:1px}\n"
    ".card dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}\n"
    ".tag{display:inline-block;margin-left:8px;padding:0 7px;border-radius:9px;font-size:11.5px;"
    "line-height:18px;vertical-align:1px;background:var(--soft);color:var(--muted);white-space:nowrap}\n"
    ".tag.good{background:var(--goodbg);color:var(--good)}\n"
    ".tag.bad{background:var(--badbg);color:var(--bad)}\n"
    "details{margin-top:14px}\n"
    "summary{cursor:pointer;color:var(--after);font-size:15px}\n"
    "details>*:not(summary){margin-top:12px}\n"
    "figure{margin:0}\n"
    "figure.map{position:relative}\n"
    "figcaption{font-weight:600;font-size:14.5px;margin-bottom:8px}\n"
    "figcaption span{color:var(--muted);font-weight:400}\n"
    "canvas,figure.map img{display:block;width:100%}\n"
    "canvas{height:0}\n"
    "figure.map img{image-rendering:pixelated}\n"
    "output{display:block;min-height:1.5em;margin-top:2px;color:var(--muted);font-size:13px}\n"
    ".ramp{display:flex;align-items:center;gap:10px;white-space:nowrap;margin-bottom:0;margin-top:2px;"
    "color:var(--muted);font-size:13px}\n"
    ".ramp i{flex:0 1 260px;min-width:60px;height:9px;border-radius:5px;background:var(--ramp)}\n"
    ".chart{display:block;width:100%;max-width:640px;height:auto}\n"
    ".chart text,.rates text{fill:var(--muted);font-size:12.5px}\n"
    ".grid{stroke:var(--line);stroke-width:1}\n"
    ".b{stroke:var(--before);fill:none;stroke-width:2}\n"
    ".bd{stroke:var(--before);fill:var(--panel);stroke-width:2}\n"
    ".a{stroke:var(--after);fill:none;stroke-width:3}\n"
    ".ad{fill:var(--after);stroke:none}\n"
    ".s0{stroke:var(--after);fill:var(--after)}.s1{stroke:#c8641c;fill:#c8641c}.s2{stroke:#6d7a1f;"
    "fill:#6d7a1f}.s3{stroke:#8a5aa8;fill:#8a5aa8}\n"
    ".ln{fill:none;stroke-width:1.6}\n"
    ".dim{opacity:.45}\n"
    "pre{margin:0;overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,\"DejaVu Sans "
    "Mono\",monospace}\n"
    "code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,\"DejaVu Sans Mono\",monospace}\n"
    "dl.rules{margin:0;display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 18px;"
    "font-size:14px}\n"
    "dl.rules dt{color:var(--muted)}\n"
    "dl.rules dd{margin:0}\n"
    "footer{margin-top:56px;padding-top:18px;padding-bottom:44px;color:var(--muted);font-size:13.5px}\n"
    "@media(max-width:860px){.tiles{grid-template-columns:1fr 1fr}.two,.side,.cards{"
    "grid-template-columns:minmax(0,1fr)}}\n"
    "@media(max-width:600px){main,header,footer{padding-left:16px;padding-right:16px}header{padding-top:30px}"
    "h1{font-size:27px}.lede{font-size:18px}section{margin-top:40px}.tiles{gap:10px}.tile{padding:13px 14px "
    "12px}.tile .big{font-size:25px}.tile .was{font-size:14px}.panel{padding:15px 14px}\n"
    ".rates thead{display:none}.rates tr{display:grid;grid-template-columns:minmax(0,1fr) auto auto;"
    "column-gap:10px;border-bottom:1px solid var(--soft);padding:6px 0}.rates tr.group{display:block;"
    "padding-bottom:0}.rates td{border:0;padding:1px 0}.rates td.pic{grid-column:1/4;grid-row:2;width:auto;"
    "padding:0 6px}.rates td span.ci{display:none}}\n"
    "@media print{body{background:#fff}.panel,.tile,.card{break-inside:avoid}section{margin-top:30px}details{"
    "display:none}.tall{max-height:none}}\n";

static const char script[] =
    "'use strict';\n"
    "(function () {\n"
    "var light = [[8,64,129],[43,123,186],[146,197,222],[247,247,245],[250,190,138],[222,101,51],[143,36,"
    "12]];\n"
    "var dark = [[154,212,255],[74,158,222],[35,90,134],[35,40,44],[138,69,38],[224,122,69],[255,197,155]];\n"
    "var scheme = window.matchMedia('(prefers-color-scheme: dark)'), paper = false;\n"
    "function cells(text) {\n"
    "var raw = atob(text), n = raw.length >> 1, out = new Float64Array(n);\n"
    "for (var i = 0; i < n; i++) {\n"
    "var v = raw.charCodeAt(2 * i) | raw.charCodeAt(2 * i + 1) << 8;\n"
    "if (v > 32767) v -= 65536;\n"
    "out[i] = v === -32768 ? NaN : v / 32767;\n"
    "}\n"
    "return out;\n"
    "}\n"
    "function colour(x, ramp) {\n"
    "var at = (x + 1) * 3, k = Math.min(5, Math.floor(at)), f = at - k, a = ramp[k], b = ramp[k + 1];\n"
    "return 'rgb(' + [0, 1, 2].map(function (c) { return Math.round(a[c] + f * (b[c] - a[c])); }).join(',') "
    "+ ')';\n"
    "}\n"
    "function signed(x) { return (x > 0 ? '+' : x < 0 ? '\\u2212' : '') + Math.abs(x).toPrecision(3); }\n"
    "function draw(f) {\n"
    "var d = f.dataset, rows = +d.rows, cols = +d.cols, canvas = f.querySelector('canvas'), ramp = "
    "scheme.matches && !paper ? dark : light;\n"
    "var width = canvas.clientWidth, left = 40, foot = 40, top = 5, w = (width - left) / cols, h = "
    "Math.max(6, Math.min(26, w, 640 / rows));\n"
    "h = Math.max(h, rows <= 8 ? 22 : 6);\n"
    "var height = Math.round(rows * h) + foot + top, ratio = window.devicePixelRatio || 1;\n"
    "if (width < 20) return;\n"
    "canvas.width = Math.round(width * ratio);\n"
    "canvas.height = Math.round(height * ratio);\n"
    "canvas.style.height = height + 'px';\n"
    "var c = canvas.getContext('2d'), ink = getComputedStyle(f.querySelector('output')).color, gap = w >= 9 "
    "? 1 : 0;\n"
    "c.scale(ratio, ratio);\n"
    "c.clearRect(0, 0, width, height);\n"
    "for (var r = 0; r < rows; r++)\n"
    "for (var e = 0; e < cols; e++) {\n"
    "var v = f.values[r * cols + e], x0 = Math.round(left + e * w), x1 = Math.round(left + (e + 1) * w), y0 "
    "= Math.round(top + r * h), y1 = Math.round(top + (r + 1) * h);\n"
    "if (v !== v) continue;\n"
    "c.fillStyle = colour(Math.max(-1, Math.min(1, v)), ramp);\n"
    "c.fillRect(x0, y0, x1 - x0 - gap, y1 - y0 - gap);\n"
    "}\n"
    "c.fillStyle = ink;\n"
    "c.font = '12px system-ui, sans-serif';\n"
    "c.textAlign = 'right';\n"
    "c.textBaseline = 'middle';\n"
    "var names = d.layers.split(','), every = Math.ceil(16 / h);\n"
    "for (r = 0; r < rows; r += every) c.fillText(names[r], left - 7, top + (r + 0.5) * h);\n"
    "c.textAlign = 'center';\n"
    "c.textBaseline = 'top';\n"
    "var step = 1;\n"
    "while (step * w < 26) step *= 2;\n"
    "for (e = 0; e < cols; e += step) c.fillText(String(e), left + (e + 0.5) * w, top + rows * h + 4);\n"
    "c.textAlign = 'left';\n"
    "c.fillText('\\u2193 layer   \\u2192 expert', left, top + rows * h + 20);\n"
    "f.box = { left: left, top: top, w: w, h: h };\n"
    "}\n"
    "function point(f, event) {\n"
    "var box = f.querySelector('canvas').getBoundingClientRect(), out = f.querySelector('output');\n"
    "var e = Math.floor((event.clientX - box.left - f.box.left) / f.box.w), r = Math.floor((event.clientY - "
    "box.top - f.box.top) / f.box.h);\n"
    "if (e < 0 || r < 0 || e >= +f.dataset.cols || r >= +f.dataset.rows) { out.textContent = ''; return; }\n"
    "var v = f.values[r * +f.dataset.cols + e];\n"
    "out.textContent = 'layer ' + f.dataset.layers.split(',')[r] + ', expert ' + e + ': ' + (v === v ? "
    "signed(v * +f.dataset.scale) : 'none');\n"
    "}\n"
    "var maps = Array.prototype.slice.call(document.querySelectorAll('figure.map'));\n"
    "function all() { maps.forEach(draw); }\n"
    "maps.forEach(function (f) {\n"
    "f.values = cells(f.dataset.cells);\n"
    "var canvas = f.querySelector('canvas');\n"
    "canvas.addEventListener('pointermove', function (event) { point(f, event); });\n"
    "canvas.addEventListener('pointerleave', function () { f.querySelector('output').textContent = ''; });\n"
    "});\n"
    "all();\n"
    "window.addEventListener('resize', all);\n"
    "scheme.addEventListener('change', all);\n"
    "window.addEventListener('beforeprint', function () { paper = true; all(); });\n"
    "window.addEventListener('afterprint', function () { paper = false; all(); });\n"
    "}());\n";

void exc_html(exc_buf *b, const char *text) {
    for (const char *p = text; *p; p++) {
        switch (*p) {
        case '&':
            exc_buf_puts(b, "&amp;");
            break;
        case '<':
            exc_buf_puts(b, "&lt;");
            break;
        case '>':
            exc_buf_puts(b, "&gt;");
            break;
        case '"':
            exc_buf_puts(b, "&quot;");
            break;
        case '\'':
            exc_buf_puts(b, "&#39;");
            break;
        default: /* control bytes have no place in a page; a browser would show nothing or guess */
            if ((unsigned char)*p < 0x20 && *p != '\n' && *p != '\t')
                exc_buf_puts(b, "\xef\xbf\xbd");
            else
                exc_buf_put(b, p, 1);
        }
    }
}

void exc_page_begin(exc_buf *b, const char *title) {
    char css[45], js[45];
    exc_sha256_base64(style, strlen(style), css);
    exc_sha256_base64(script, strlen(script), js);
    exc_buf_puts(b, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    exc_buf_printf(
        b,
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src "
        "'sha256-%s'; script-src 'sha256-%s'; base-uri 'none'; form-action 'none'\">\n",
        css, js);
    exc_buf_puts(
        b,
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"referrer\" "
        "content=\"no-referrer\">\n<title>");
    exc_html(b, title);
    exc_buf_printf(b, "</title>\n<style>%s</style>\n</head>\n<body>\n", style);
}

void exc_page_end(exc_buf *b) { exc_buf_printf(b, "<script>%s</script>\n</body>\n</html>\n", script); }
