package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/backoff"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// What clients of a headless service wait for; docs/operations.md says where
// these come from.
const (
	resolutionInterval = 30 * time.Second // grpc-go asks DNS no more often
	dnsTTL             = 30 * time.Second // kubeadm's CoreDNS
	killMargin         = time.Second      // from the end of the drain to SIGKILL
)

// manifests is shop.yaml.
type manifests struct {
	t *testing.T

	config     corev1.ConfigMap
	deployment appsv1.Deployment
	headless   corev1.Service
	l4         corev1.Service
	budget     policyv1.PodDisruptionBudget
}

// readManifests reads shop.yaml; a field that Kubernetes does not know, a key
// that comes twice and a value of the wrong type are errors.
func readManifests(t *testing.T) *manifests {
	t.Helper()
	text, err := os.ReadFile("shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m := &manifests{t: t}
	into := []any{&m.config, &m.deployment, &m.headless, &m.l4, &m.budget}
	kinds := []string{"v1/ConfigMap", "apps/v1/Deployment", "v1/Service", "v1/Service", "policy/v1/PodDisruptionBudget"}
	docs := strings.Split(string(text), "\n---\n")
	if len(docs) != len(into) {
		t.Fatalf("shop.yaml has %d documents, this test knows %d", len(docs), len(into))
	}
	for i, doc := range docs {
		if err := yaml.UnmarshalStrict([]byte(doc), into[i]); err != nil {
			t.Fatalf("document %d: %v", i+1, err)
		}
		var head struct{ APIVersion, Kind string }
		if err := yaml.Unmarshal([]byte(doc), &head); err != nil || head.APIVersion+"/"+head.Kind != kinds[i] {
			t.Fatalf("document %d is %+v, %v, want %s", i+1, head, err, kinds[i])
		}
	}
	return m
}

func (m *manifests) policyYAML() string { return m.config.Data["policy.yaml"] }

func (m *manifests) policy() *resiliencev1.Policy {
	m.t.Helper()
	p, err := interceptors.Parse("policy.yaml", []byte(m.policyYAML()))
	if err != nil {
		m.t.Fatal(err)
	}
	return p
}

func (m *manifests) container() corev1.Container {
	m.t.Helper()
	if n := len(m.deployment.Spec.Template.Spec.Containers); n != 1 {
		m.t.Fatalf("%d containers", n)
	}
	return m.deployment.Spec.Template.Spec.Containers[0]
}

// preStop is how long the hook takes.
func (m *manifests) preStop() time.Duration {
	m.t.Helper()
	hooks := m.container().Lifecycle
	if hooks == nil || hooks.PreStop == nil {
		return 0
	}
	if hooks.PreStop.Sleep == nil {
		m.t.Fatal("how long preStop takes cannot be read off it: use sleep")
	}
	return seconds(hooks.PreStop.Sleep.Seconds)
}

func seconds[N int32 | int64](n N) time.Duration { return time.Duration(n) * time.Second }

// The numbers of the manifests and of the policy fit together.
func TestNumbersFit(t *testing.T) {
	m := readManifests(t)
	drain := m.policy().GetServer().GetDrain()
	announce, grace, cut := drain.GetAnnounce().AsDuration(), drain.GetGrace().AsDuration(), drain.GetCut().AsDuration()
	spec := m.deployment.Spec
	rolling := spec.Strategy.RollingUpdate
	ready := m.container().ReadinessProbe
	available := seconds(spec.MinReadySeconds)

	atLeast := func(what string, got, want time.Duration) {
		t.Helper()
		if got < want {
			t.Errorf("%s is %v, want at least %v", what, got, want)
		}
	}
	if announce != 5*time.Second || grace != 15*time.Second || cut != 5*time.Second {
		t.Errorf("the drain is %v + %v + %v, not the defaults", announce, grace, cut)
	}
	atLeast("terminationGracePeriodSeconds", seconds(*spec.Template.Spec.TerminationGracePeriodSeconds), m.preStop()+announce+grace+cut+killMargin)
	atLeast("announce", announce, seconds(ready.PeriodSeconds*ready.FailureThreshold))
	atLeast("the probe's period", seconds(ready.PeriodSeconds), seconds(ready.TimeoutSeconds))
	atLeast("minReadySeconds", available, time.Duration(float64(backoff.DefaultConfig.BaseDelay)*(1+backoff.DefaultConfig.Jitter)))
	// A client that resolved just before the first pod ended asks again before the last has.
	atLeast("minReadySeconds of all pods but one", available*time.Duration(*spec.Replicas-1), resolutionInterval+dnsTTL)
	if rolling.MaxUnavailable.IntValue() != 0 || rolling.MaxSurge.IntValue() != 1 {
		t.Errorf("maxUnavailable %v, maxSurge %v", rolling.MaxUnavailable, rolling.MaxSurge)
	}
	if m.budget.Spec.MaxUnavailable.IntValue() >= int(*spec.Replicas) {
		t.Errorf("the disruption budget lets all %d pods go", *spec.Replicas)
	}
	if progress := 600 * time.Second; spec.ProgressDeadlineSeconds == nil && available >= progress {
		t.Errorf("a rollout that waits %v for each pod misses its default deadline", available)
	}
	for i, rule := range m.policy().GetServer().GetRules() {
		if rule.GetTimeout() == nil {
			t.Errorf("rule %d has no timeout: a unary call may outlast grace", i)
		}
		atLeast("grace", grace, rule.GetTimeout().AsDuration())
	}
}

// The documents speak of one another.
func TestNamesFit(t *testing.T) {
	m := readManifests(t)
	pods, c := m.deployment.Spec.Template, m.container()
	for what, selector := range map[string]map[string]string{
		"the Deployment": m.deployment.Spec.Selector.MatchLabels, "the headless Service": m.headless.Spec.Selector,
		"the L4 Service": m.l4.Spec.Selector, "the PodDisruptionBudget": m.budget.Spec.Selector.MatchLabels,
	} {
		if len(selector) != 1 || selector["app"] != pods.Labels["app"] {
			t.Errorf("%s selects %v, the pods have %v", what, selector, pods.Labels)
		}
	}
	if m.headless.Spec.ClusterIP != corev1.ClusterIPNone || m.l4.Spec.ClusterIP != "" {
		t.Errorf("cluster IPs %q and %q", m.headless.Spec.ClusterIP, m.l4.Spec.ClusterIP)
	}
	port := c.Ports[0]
	for _, s := range []corev1.Service{m.headless, m.l4} {
		if s.Spec.Ports[0].TargetPort.String() != port.Name {
			t.Errorf("service %s targets port %v, the container has %s", s.Name, &s.Spec.Ports[0].TargetPort, port.Name)
		}
	}
	if c.ReadinessProbe.GRPC == nil || c.ReadinessProbe.GRPC.Port != port.ContainerPort || c.ReadinessProbe.GRPC.Service != nil {
		t.Errorf("the readiness probe is %+v", c.ReadinessProbe.ProbeHandler)
	}
	if c.LivenessProbe != nil && c.LivenessProbe.GRPC != nil {
		t.Error("a liveness probe of the health service would end a pod that drains")
	}
	args := strings.Join(c.Args, " ")
	for _, want := range []string{fmt.Sprintf("-listen=:%d", port.ContainerPort), "-policy=" + c.VolumeMounts[0].MountPath + "/policy.yaml"} {
		if !strings.Contains(args, want) {
			t.Errorf("args %s, want %s", args, want)
		}
	}
	volume := pods.Spec.Volumes[0]
	if volume.Name != c.VolumeMounts[0].Name || volume.ConfigMap.Name != m.config.Name {
		t.Errorf("the volume is %+v", volume)
	}
}

// docs/operations.md has a row for each number, with the number.
func TestNumbersAreDocumented(t *testing.T) {
	m := readManifests(t)
	doc, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	spec, ready := m.deployment.Spec, m.container().ReadinessProbe
	age := regexp.MustCompile(`-max-connection-age=(\S+)`).FindStringSubmatch(strings.Join(m.container().Args, " "))
	if age == nil {
		t.Fatal("no -max-connection-age")
	}
	preStop := "none"
	if d := m.preStop(); d > 0 {
		preStop = d.String()
	}
	for key, value := range map[string]any{
		"announce": "5s", "grace": "15s", "cut": "5s", // the test above holds these
		"preStop":                       preStop,
		"terminationGracePeriodSeconds": *spec.Template.Spec.TerminationGracePeriodSeconds,
		"replicas":                      *spec.Replicas,
		"minReadySeconds":               spec.MinReadySeconds,
		"maxUnavailable":                spec.Strategy.RollingUpdate.MaxUnavailable,
		"maxSurge":                      spec.Strategy.RollingUpdate.MaxSurge,
		"readinessProbe":                fmt.Sprintf("%d × %ds", ready.FailureThreshold, ready.PeriodSeconds),
		"-max-connection-age":           age[1],
		"timeout":                       m.policy().GetServer().GetRules()[0].GetTimeout().AsDuration(),
	} {
		if row := fmt.Sprintf("| `%s` | %v |", key, value); !strings.Contains(string(doc), row) {
			t.Errorf("docs/operations.md has no row %q", row)
		}
	}
}
