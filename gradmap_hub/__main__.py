from gradmap_hub.cli import main

if __name__ == "__main__":
    main()
