# A Nomad system job: the snapback daemon with a pool on every node that has images. It serves the
# node's pools to whoever may use its socket there; which job gets to which node is Nomad's business.
#
# A node says by `meta { snapback = "true" }` that it has snapback and QEMU installed and images in
# /srv/images. The driver `raw_exec` has to be enabled: QEMU needs userfaultfd, and the daemon the
# right to trace it, so it runs as the Nomad client does, as root. Jobs on that node take guests by
# /run/snapback/daemon.sock: those of `raw_exec` as it is, those of `docker` with that directory
# mounted at the same path.
#
# Tried: that it can be parsed as HCL 2 (python-hcl2), and the commands by hand. Not tried: a Nomad.

job "snapback" {
  type = "system"

  constraint {
    attribute = "${meta.snapback}"
    value     = "true"
  }

  group "node" {
    # Guests end with their daemon, so it is not restarted in vain.
    restart {
      attempts = 3
      interval = "10m"
      delay    = "5s"
      mode     = "delay"
    }

    task "daemon" {
      driver = "raw_exec"

      config {
        command = "/usr/bin/snapback"
        args    = ["daemon", "--socket", "/run/snapback/daemon.sock"]
      }

      kill_timeout = "30s"

      # The guests count here as well: they are its children.
      resources {
        cpu    = 4000
        memory = 16384
      }
    }

    # Makes the pool once the daemon answers.
    task "pool" {
      driver = "raw_exec"

      lifecycle {
        hook = "poststart"
      }

      template {
        destination = "local/booted.json"
        data        = <<-JSON
          {
            "name": "booted",
            "image": "/srv/images/booted.snap",
            "armed": 4,
            "max": 16,
            "ports": { "2222": 0 },
            "lifetime_s": 7200
          }
        JSON
      }

      config {
        command = "/usr/bin/curl"
        args = [
          "--silent", "--show-error", "--fail-with-body",
          "--retry", "30", "--retry-delay", "1", "--retry-all-errors",
          "--unix-socket", "/run/snapback/daemon.sock",
          "--header", "Content-Type: application/json",
          "--data", "@local/booted.json",
          "http://localhost/v1/pools",
        ]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
