package main

import (
	"fmt"
	"html"
	"math"
	"strings"
	"time"
)

// A chart is a drawing of one figure over time, for each arm.
type chart struct {
	file, title, axis string
	run               run
	set               settings
	of                func([]sample) float64
}

// Colours are Okabe and Ito's, for those who see fewer; the strokes tell them apart, too.
var strokes = [...]struct{ colour, dash string }{
	{"#0072B2", ""}, {"#D55E00", "7 3"}, {"#009E73", "2 3"}, {"#A6488A", "9 3 2 3"},
}

const (
	width, height            = 760, 330
	left, right, top, bottom = 62, 16, 62, 46
)

// svg draws it, on a ground of its own: it can be read in a dark page as well.
func (c chart) svg() string {
	fault, end := c.run.spans(c.set)
	step := min(time.Second, end/10)
	from := -step
	series := make([][]float64, len(arms))
	most := 0.0
	for i, a := range arms {
		for at := from; at < end; at += step {
			v := c.of(between(c.run.samples[a.name], at, at+step))
			series[i], most = append(series[i], v), max(most, v)
		}
	}
	tick := niceStep(most / 4)
	most = math.Max(tick, math.Ceil(most/tick)*tick)
	x := func(t time.Duration) float64 {
		return left + (t-from).Seconds()/(end-from).Seconds()*(width-left-right)
	}
	y := func(v float64) float64 { return height - bottom - v/most*(height-top-bottom) }

	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="#222">`, width, height, width, height)
	p(`<title>%s</title>`, html.EscapeString(c.title))
	p(`<rect width="%d" height="%d" rx="6" fill="#fff"/>`, width, height)
	p(`<text x="%d" y="22" font-size="15" font-weight="bold">%s</text>`, left, html.EscapeString(c.title))
	if c.run.ends() {
		p(`<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="#f3e3c3"/>`, x(0), top, x(fault)-x(0), height-top-bottom)
	}
	for v := 0.0; v <= most*1.001; v += tick {
		p(`<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/>`, left, width-right, y(v), y(v))
		p(`<text x="%d" y="%.1f" text-anchor="end">%v</text>`, left-6, y(v)+4, math.Round(v*100)/100)
	}
	seconds := max(1, math.Round(end.Seconds()/12))
	for s := 0.0; s <= end.Seconds(); s += seconds {
		at := x(time.Duration(s * float64(time.Second)))
		p(`<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#222"/>`, at, at, height-bottom, height-bottom+4)
		p(`<text x="%.1f" y="%d" text-anchor="middle">%v</text>`, at, height-bottom+18, s)
	}
	p(`<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="#222"/>`, left, width-right, height-bottom, height-bottom)
	caption := "time, s"
	if c.run.ends() {
		caption += "; the endpoint is bad where the ground is coloured"
	}
	p(`<text x="%d" y="%d" text-anchor="middle">%s</text>`, (left+width-right)/2, height-8, caption)
	p(`<text transform="translate(14 %d) rotate(-90)" text-anchor="middle">%s</text>`, (top+height-bottom)/2, html.EscapeString(c.axis))
	at := left
	for i := len(arms) - 1; i >= 0; i-- { // ours on top
		var points []string
		for k, v := range series[i] {
			points = append(points, fmt.Sprintf("%.1f,%.1f", x(from+time.Duration(k)*step+step/2), y(v)))
		}
		p(`<polyline fill="none" stroke="%s" stroke-width="%v" stroke-dasharray="%s" points="%s"/>`, strokes[i].colour, strokeWidth(i), strokes[i].dash, strings.Join(points, " "))
	}
	for i, a := range arms {
		p(`<line x1="%d" x2="%d" y1="42" y2="42" stroke="%s" stroke-width="%v" stroke-dasharray="%s"/>`, at, at+30, strokes[i].colour, strokeWidth(i), strokes[i].dash)
		p(`<text x="%d" y="46">%s</text>`, at+36, a.name)
		at += 52 + 7*len(a.name)
	}
	p(`</svg>`)
	return b.String()
}

func strokeWidth(arm int) float64 {
	if arms[arm].name == ours {
		return 2.6
	}
	return 1.8
}

// niceStep is the least of 1, 2 and 5 times a power of ten that is not less.
func niceStep(v float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(max(v, 0.01))))
	for _, m := range []float64{1, 2, 5} {
		if m*power >= v {
			return m * power
		}
	}
	return 10 * power
}
