# summary.awk - a table of the rows of excise_gpu and eager.py: for every op and shape our time and rates, and how many times longer
# cuBLASLt (two products in place of an edit, one in place of a matmul), cuSOLVER and torch take for the same.
#
#   awk -f bench/summary.awk bench/results/GPU.jsonl
function text(name) { return match($0, "\"" name "\":\"[^\"]*\"") ? substr($0, RSTART + length(name) + 4, RLENGTH - length(name) - 5) : "" }
function number(name) { return match($0, "\"" name "\":-?[0-9.]+") ? substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) : "" }
function percent(share) { return share == "" ? "" : sprintf("%.1f", 100 * share) }
function times(key, by) { return (key, by) in us && us[key, "excise"] > 0 ? sprintf("%.2f", us[key, by] / us[key, "excise"]) : (key, by) in why ? "-" : "" }
/^{/ {
    by = text("by")
    if (text("row") == "machine") { machine = text("shape"); libraries = text("note"); next }
    key = text("row") "|" text("shape")
    if (gpu == "") gpu = text("gpu")
    if (index($0, "\"quick\":true")) quick = 1
    if (!((key) in seen)) { seen[key] = 1; order[++n] = key }
    if (index($0, "\"skipped\":")) { why[key, by] = text("skipped"); next }
    if (by == "cuSOLVER" || by == "driver") by = "cuBLASLt"
    us[key, by] = number("us")
    if (by == "excise" || !((key, "gb_s") in figure)) {
        figure[key, "gb_s"] = number("gb_s"); figure[key, "of_copy"] = number("of_copy"); figure[key, "tflop_s"] = number("tflop_s")
        figure[key, "of_peak"] = number("of_peak"); figure[key, "tokens_s"] = number("tokens_s"); figure[key, "overhead"] = number("overhead_percent")
        figure[key, "floor"] = number("floor_us")
    }
}
END {
    gsub(/;(cu|wg)/, "\n&", libraries); gsub(/\n;/, "\n", libraries)
    printf "%s, %s%s\n%s\n", gpu, machine, quick ? ", --quick: no figure means anything" : "", libraries
    printf "%-17s %-60s %12s %9s %6s %9s %6s %9s %8s\n", "row", "shape", "us", "GB/s", "% copy", "TFLOP/s", "% peak", "x library", "x torch"
    for (i = 1; i <= n; i++) {
        key = order[i]
        split(key, part, "|")
        shape = substr(key, length(part[1]) + 2)
        ours = (key, "excise") in us ? us[key, "excise"] : ""
        if (ours == "" && (key, "excise") in why) { printf "%-17s %-60s skipped: %s\n", part[1], shape, why[key, "excise"]; continue }
        if (figure[key, "overhead"] != "") { printf "%-17s %-60s %+11.2f %%\n", part[1], shape, figure[key, "overhead"]; continue }
        if (ours == "") { # only others did it: the limits
            for (other in us) { split(other, of, SUBSEP); if (of[1] == key && of[2] != "torch") ours = us[other] }
        }
        if (ours == "") { for (other in why) { split(other, of, SUBSEP); if (of[1] == key) printf "%-17s %-60s skipped: %s\n", part[1], shape, why[other] } continue }
        printf "%-17s %-60s %12.1f %9s %6s %9s %6s %9s %8s", part[1], shape, ours, figure[key, "gb_s"], percent(figure[key, "of_copy"]), figure[key, "tflop_s"],
               percent(figure[key, "of_peak"]), times(key, "cuBLASLt"), times(key, "torch")
        if (figure[key, "tokens_s"] != "") printf "  %.0f tokens/s", figure[key, "tokens_s"]
        if (figure[key, "floor"] != "") printf "  floor %.1f us", figure[key, "floor"]
        printf "\n"
    }
}
