from optwire_server.main import main

raise SystemExit(main())
